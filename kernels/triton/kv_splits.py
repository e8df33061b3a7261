"""Decoding has few rows and many keys: programs share a row's keys and leave the state of their running softmax.

A state is what :func:`~.primitives.online_softmax` carries: base-2 maximum ``m``, sum ``l`` and unnormalised ``acc``,
fp32. Put together they give the very softmax of one pass, without the rounding of a log-sum-exp in between.
"""

import triton
import triton.language as tl

from .kernel_structs import Strided
from .primitives import store_rows


@triton.jit
def split_range(low, full, high, split, splits, BLOCK: tl.constexpr):
    """This split's ``low, full, high``: an even share of the tiles of :func:`~.primitives.key_range`, maybe none.

    The share is of what is visible, which only the device knows (a static cache, a ragged bank).
    """
    share = tl.cdiv(tl.cdiv(tl.maximum(high - low, 0), BLOCK), splits) * BLOCK
    my_low = low + split * share
    my_high = tl.minimum(high, my_low + share)
    my_full = tl.minimum(tl.maximum(full, my_low), my_high)
    return my_low, my_full, my_high


@triton.jit
def store_state(partial_acc, partial_m, partial_l, split, rows, place, valid, m_i, l_i, acc,
                D_V: tl.constexpr, BLOCK_DV: tl.constexpr):  # fmt: skip
    """State of rows ``place`` of lse ``[B, H, S]``, ``rows`` in all: ``[splits, rows (, D_v)]``.

    Rows are numbered in int32, which leaves registers to tiles: the states of 2^31 rows are larger than any memory.
    """
    slot = split.to(tl.int64) * rows + place
    tl.store(partial_m + slot, m_i, mask=valid)
    tl.store(partial_l + slot, l_i, mask=valid)
    zero = tl.zeros_like(split)
    store_rows(Strided(partial_acc, 0, 0, D_V, 1), zero, zero, slot, valid, acc, D_V, BLOCK_DV)
