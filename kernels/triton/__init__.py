"""Prefix attention in Triton, free of torch: every kernel takes pointers, strides and sizes and nothing else.

``views`` names what kernels are handed, ``primitives`` is the algebra they share; each other file is one stage.
"""
