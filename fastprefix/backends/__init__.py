"""One module a backend, each three plain functions: ``unsupported``, ``fwd``, ``bwd``."""
