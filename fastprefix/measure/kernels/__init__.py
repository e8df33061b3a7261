"""The Triton kernels' tiles: what each compiles to without a GPU, and which are fastest on one."""
