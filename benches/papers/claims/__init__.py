"""The experiments, one a file; each file has one ``EXPERIMENT``."""
