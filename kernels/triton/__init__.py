"""Prefix attention in Triton, free of torch: every kernel takes pointers, strides and sizes and nothing else.

``kernel_structs`` names what kernels are handed, ``primitives`` is the algebra they share; the other files are stages.
"""
