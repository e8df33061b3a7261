"""Prefix attention in Triton, free of torch: every kernel takes pointers, strides and sizes and nothing else.

``kernel_structs`` defines their arguments, ``primitives`` the algebra they share; each other file is one stage.
"""
