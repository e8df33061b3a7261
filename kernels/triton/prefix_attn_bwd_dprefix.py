"""Gradients of the prefix's keys, values and bias, summed over batch, query rows and the heads of a group: stage one.

A prefix has few tokens and very many rows, so the rows are split over the grid; each program leaves an fp32 partial and
``prefix_attn_bwd_reduce`` sums them.
"""

import triton
import triton.language as tl

from .flat_rows import count_rows, flat_rows
from .primitives import biased, dot, load_keys, load_lse, load_rows, logits, prefix_length, through_softcap


@triton.jit
def add_dprefix(dk, dv, dbias, q, do, k, v, bank, n, h_kv, token, length, lse, delta, scale, softcap,
                TRANSPOSED: tl.constexpr, NEED_K: tl.constexpr, NEED_V: tl.constexpr,
                NEED_BIAS: tl.constexpr):  # fmt: skip
    """One tile of rows onto ``dk [BLOCK_P, D]`` and ``dbias [BLOCK_P]``; TRANSPOSED: ``dk [D, BLOCK_P]``, which a wgmma
    of fewer than 64 prefix tokens needs (its M is 64).
    """
    if TRANSPOSED:
        raw = dot(q, k.T)  # [BLOCK_M, BLOCK_P]
        x = biased(logits(raw, scale, softcap), bank, n, h_kv, token[None, :], (token < length)[None, :])
        p = tl.exp2(x - lse[:, None])
        if NEED_V:
            dv = dot(do.T, p.to(do.dtype), dv)
        if NEED_K or NEED_BIAS:
            ds = p * (dot(do, v.T) - delta[:, None])
            if NEED_BIAS:
                dbias += tl.sum(ds, 0)
            if NEED_K:
                dk = dot(q.T, through_softcap(ds, raw, scale, softcap).to(q.dtype), dk)
    else:
        raw = dot(k, q.T)  # [BLOCK_P, BLOCK_M]
        x = biased(logits(raw, scale, softcap), bank, n, h_kv, token[:, None], (token < length)[:, None])
        p = tl.exp2(x - lse[None, :])
        if NEED_V:
            dv = dot(p.to(do.dtype), do, dv)
        if NEED_K or NEED_BIAS:
            ds = p * (dot(v, do.T) - delta[None, :])
            if NEED_BIAS:
                dbias += tl.sum(ds, 1)
            if NEED_K:
                dk = dot(through_softcap(ds, raw, scale, softcap).to(q.dtype), q, dk)
    return dk, dv, dbias


@triton.jit
def store_partial(out, acc, slot, first, length, P, D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
                  TRANSPOSED: tl.constexpr):  # fmt: skip
    """Write ``out [slot, P, D]``; tokens beyond the prefix's length get 0."""
    if TRANSPOSED:
        acc = acc.T
    p = first + tl.arange(0, BLOCK_P)
    d = tl.arange(0, BLOCK_D)
    where = (slot.to(tl.int64) * P + p)[:, None] * D + d[None, :]
    value = tl.where((p < length)[:, None], acc, 0.0)
    tl.store(out + where, value.to(out.dtype.element_ty), mask=(p < P)[:, None] & (d < D)[None, :])


@triton.jit(do_not_specialize=["B", "S", "P", "splits", "H_kv"])
def _prefix_attn_bwd_dprefix_kernel(
    q, do,  # Strided [B, H, S, D], [B, H, S, D_v]
    o,  # Strided [B, H, S, D_v] where delta is None
    prefix_k, prefix_v,  # Strided [N, H_kv, P, D]
    partial_k, partial_v,  # [splits, N, H_kv, P, D] contiguous, or None
    partial_bias,  # [splits, N, H_kv, P] contiguous, or None
    lse,  # fp32 [B, H, S]
    delta,  # fp32 [B, H, S], or None: rowsum(do * o) is taken here
    bank, order, scale, softcap, B, S, P, N, H_kv, splits,
    G: tl.constexpr, D: tl.constexpr, D_V: tl.constexpr, UNIT_IS_TOKEN: tl.constexpr, NEED_K: tl.constexpr,
    NEED_V: tl.constexpr, NEED_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """One tile of prefix tokens and one split of its rows. Grid: ``splits * N * H_kv * cdiv(P, BLOCK_P)``, programs
    that read the same rows side by side.
    """
    blocks = tl.cdiv(P, BLOCK_P)
    first_token = tl.program_id(0) % blocks * BLOCK_P
    h_kv = tl.program_id(0) // blocks % H_kv
    n = tl.program_id(0) // blocks // H_kv % N
    split = tl.program_id(0) // blocks // H_kv // N
    length = prefix_length(bank, n, P)
    total = tl.where(first_token < length, count_rows(order, n, B, S, G, UNIT_IS_TOKEN), 0)
    share = tl.cdiv(tl.cdiv(total, BLOCK_M), splits) * BLOCK_M
    k = load_keys(prefix_k, n, h_kv, first_token, length, D, BLOCK_P, BLOCK_D, False)
    v = load_keys(prefix_v, n, h_kv, first_token, length, D_V, BLOCK_P, BLOCK_DV, False)
    TRANSPOSED: tl.constexpr = BLOCK_P < 64
    if TRANSPOSED:
        dk = tl.zeros([BLOCK_D, BLOCK_P], tl.float32)
        dv = tl.zeros([BLOCK_DV, BLOCK_P], tl.float32)
    else:
        dk = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
        dv = tl.zeros([BLOCK_P, BLOCK_DV], tl.float32)
    dbias = tl.zeros([BLOCK_P], tl.float32)
    token = first_token + tl.arange(0, BLOCK_P)
    for first in range(split * share, tl.minimum(total, split * share + share), BLOCK_M):
        b, s, g, row = flat_rows(order, n, first, B, S, G, UNIT_IS_TOKEN, BLOCK_M)
        h = h_kv * G + g
        place = (b.to(tl.int64) * H_kv * G + h) * S + s
        q_tile = load_rows(q, b, h, s, row, D, BLOCK_D)
        do_tile = load_rows(do, b, h, s, row, D_V, BLOCK_DV)
        lse_i = load_lse(lse, place, row)
        if delta is None:
            o_tile = load_rows(o, b, h, s, row, D_V, BLOCK_DV)
            delta_i = tl.sum(do_tile.to(tl.float32) * o_tile.to(tl.float32), 1)
        else:
            delta_i = tl.load(delta + place, mask=row, other=0.0)
        dk, dv, dbias = add_dprefix(dk, dv, dbias, q_tile, do_tile, k, v, bank, n, h_kv, token, length, lse_i, delta_i,
                                    scale, softcap, TRANSPOSED, NEED_K, NEED_V, NEED_BIAS)  # fmt: skip
    slot = (split * N + n) * H_kv + h_kv
    if NEED_K:
        store_partial(partial_k, dk * scale, slot, first_token, length, P, D, BLOCK_P, BLOCK_D, TRANSPOSED)
    if NEED_V:
        store_partial(partial_v, dv, slot, first_token, length, P, D_V, BLOCK_P, BLOCK_DV, TRANSPOSED)
    if NEED_BIAS:
        value = tl.where(token < length, dbias, 0.0).to(partial_bias.dtype.element_ty)
        tl.store(partial_bias + slot.to(tl.int64) * P + token, value, mask=token < P)
