"""Argument structs of kernels: tensors as a pointer and its strides, masks and banks as their parts.

An absent part is None, which Triton specialises on, so that no separate flag can contradict it.
"""

from typing import Any, NamedTuple


class Strided(NamedTuple):
    """A 4-D tensor ``[B, H, S, D]`` (a prefix: ``[N, H_kv, P, D]``); strides in elements."""

    ptr: Any
    b: Any
    h: Any
    s: Any
    d: Any


class Mask(NamedTuple):
    """What hides content keys besides causality."""

    q_start: Any  # int pointer, or None where it is a number
    q_start_b: Any  # its stride between samples
    window: Any  # int or None
    padding: Any  # uint8 pointer [B, T], 0 = hidden, or None
    padding_b: Any
    padding_t: Any
    segments: Any  # int pointer [B, T], or None
    segments_b: Any
    segments_t: Any
    bias: Any  # pointer [B, H, S, T] (broadcast strides are 0), float or uint8 with 0 = hidden, or None
    bias_b: Any
    bias_h: Any
    bias_s: Any
    bias_t: Any


class Bank(NamedTuple):
    """Which prefix a row reads."""

    ids: Any  # int pointer [B] or [B, S], -1 = none; None: prefix 0 for all
    ids_b: Any
    ids_s: Any  # None: one id a sample
    lens: Any  # int pointer [N], or None
    bias: Any  # fp32 pointer [N, H_kv, P], added to scores, or None
    bias_n: Any
    bias_h: Any


class Order(NamedTuple):
    """Rows by prefix, as in a CSR matrix, for the second pass over a bank."""

    units: Any  # int64 pointer: samples (or tokens) sorted by id; None: all rows, one prefix
    first: Any  # int64 pointer [N + 1]: where each prefix's units begin
