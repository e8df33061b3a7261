"""Decoding, last stage: the states of all splits, the prefix's first, and the sink become one softmax."""

import triton
import triton.language as tl

from .primitives import LOG2E, log_sum_exp, store_rows


@triton.jit
def merge(m_i, l_i, acc, partial_acc, partial_m, partial_l, place, rows, prefix_splits, end, has_prefix,
          D_V: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_DV: tl.constexpr):  # fmt: skip
    """States 0 to ``end``; without ``acc`` (None) only their log-sum-exp's two parts. A row without a prefix has no
    state in the prefix's splits: no program wrote one.
    """
    d = tl.arange(0, BLOCK_DV)
    for first in range(0, end, BLOCK_S):
        split = first + tl.arange(0, BLOCK_S)
        keep = (split < end)[None, :] & (place < rows)[:, None]  # [BLOCK_M, BLOCK_S]
        if has_prefix is not None:
            keep = keep & (has_prefix[:, None] | (split >= prefix_splits)[None, :])
        slot = split[None, :].to(tl.int64) * rows + place[:, None]
        x = tl.load(partial_m + slot, mask=keep, other=float("-inf"))
        l = tl.load(partial_l + slot, mask=keep, other=0.0)
        m = tl.maximum(m_i, tl.max(x, 1))
        shift = tl.where(m == float("-inf"), 0.0, m)
        weight = tl.exp2(x - shift[:, None])
        alpha = tl.exp2(m_i - shift)
        l_i = l_i * alpha + tl.sum(weight * l, 1)
        if acc is not None:
            # By l, not by m: the maximum of nan is -inf, and nan is to be seen.
            some = (l != 0.0)[:, :, None] & (d < D_V)[None, None, :]
            part = tl.load(partial_acc + slot[:, :, None] * D_V + d[None, None, :], mask=some, other=0.0)
            acc = acc * alpha[:, None] + tl.sum(weight[:, :, None] * part, 1)
        m_i = m
    return m_i, l_i, acc


@triton.jit(do_not_specialize=["S", "rows", "prefix_splits", "splits", "H"])
def _prefix_attn_decode_combine_kernel(
    partial_acc,  # fp32 [splits, B * H * S, D_v]
    partial_m, partial_l,  # fp32 [splits, B * H * S]
    o,  # Strided [B, H, S, D_v]
    lse,  # fp32 [B, H, S]
    prefix_lse,  # fp32 [B, H, S], or None
    sinks,  # [H], or None
    bank, H, S, rows, prefix_splits, splits,
    D_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """``BLOCK_M`` rows of ``[B, H, S]``, ``BLOCK_S`` splits at a time. Grid: ``cdiv(rows, BLOCK_M)``."""
    place = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row = place < rows
    s = place % S
    h = place // S % H
    b = place // S // H
    has_prefix = None
    if bank.ids is not None:
        where = b.to(tl.int64) * bank.ids_b
        if bank.ids_s is not None:
            where = where + s.to(tl.int64) * bank.ids_s
        has_prefix = tl.load(bank.ids + where, mask=row, other=-1) >= 0

    nothing = tl.full([BLOCK_M], float("-inf"), tl.float32)
    zero = tl.zeros([BLOCK_M], tl.float32)
    if prefix_lse is not None:
        m_i, l_i, _ = merge(nothing, zero, None, partial_acc, partial_m, partial_l, place, rows, prefix_splits,
                            prefix_splits, has_prefix, D_V, BLOCK_S, BLOCK_DV)  # fmt: skip
        tl.store(prefix_lse + place, log_sum_exp(m_i, l_i), mask=row)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    m_i, l_i, acc = merge(nothing, zero, acc, partial_acc, partial_m, partial_l, place, rows, prefix_splits, splits,
                          has_prefix, D_V, BLOCK_S, BLOCK_DV)  # fmt: skip

    weight = tl.full([BLOCK_M], 1.0, tl.float32)
    total = log_sum_exp(m_i, l_i)
    if sinks is not None:
        # A part with o = 0. Its base-2 logit must not overflow to "nothing at all".
        sink = tl.load(sinks + h, mask=row, other=0.0).to(tl.float32)
        sink_2 = tl.where(sink == float("-inf"), sink, tl.maximum(sink, -2e38) * LOG2E)
        m = tl.maximum(m_i, sink_2)
        shift = tl.where(m == float("-inf"), 0.0, m)
        weight = tl.exp2(m_i - shift)
        l_i = l_i * weight + tl.exp2(sink_2 - shift)
        total = tl.where(m_i == float("-inf"), sink, log_sum_exp(m, l_i))
    weight = weight / tl.where(l_i == 0.0, 1.0, l_i)
    store_rows(o, b, h, s, row, acc * weight[:, None], D_V, BLOCK_DV)
    tl.store(lse + place, total, mask=row)
