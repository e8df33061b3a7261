"""dQ: the prefix's part and the content's in one pass, given the merged ``lse`` and ``delta``.

``ds = p * (dp - delta)`` with ``p = exp(x - lse)`` and ``dp = do v^T``: for either part the ordinary flash backward.
"""

import triton
import triton.language as tl

from .primitives import (
    NO_ID,
    biased,
    dot,
    key_range,
    load_keys,
    load_lse,
    load_rows,
    logits,
    next_prefix,
    packed_rows,
    prefix_length,
    query_start,
    row_prefixes,
    sample_prefix,
    segment_ids,
    segment_range,
    store_rows,
    through_softcap,
    visible,
)


@triton.jit
def add_dq(dq, x, raw, k, v, do, lse, delta, scale, softcap):
    """One tile of keys: logits ``x`` of ``raw`` products, all ``[BLOCK_M, BLOCK_N]``."""
    p = tl.exp2(x - lse[:, None])
    ds = p * (dot(do, v.T) - delta[:, None])
    ds = through_softcap(ds, raw, scale, softcap)
    return dot(ds.to(k.dtype), k, dq)


@triton.jit
def add_prefix_dq(dq, q, do, lse, delta, prefix_k, prefix_v, bank, n, h_kv, length, ids, scale, softcap,
                  D: tl.constexpr, D_V: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
                  BLOCK_DV: tl.constexpr, TMA: tl.constexpr):  # fmt: skip
    """All tokens of prefix ``n``, of which the last tile alone needs a mask; with ``ids [BLOCK_M]`` only for the rows
    that read it, which each tile masks.
    """
    full = 0
    if ids is None:
        full = length // BLOCK_P * BLOCK_P
        for first in range(0, full, BLOCK_P):
            k = load_keys(prefix_k, n, h_kv, first, length, D, BLOCK_P, BLOCK_D, TMA)
            v = load_keys(prefix_v, n, h_kv, first, length, D_V, BLOCK_P, BLOCK_DV, TMA)
            raw = dot(q, k.T)
            token = (first + tl.arange(0, BLOCK_P))[None, :]
            x = biased(logits(raw, scale, softcap), bank, n, h_kv, token, token < length)
            dq = add_dq(dq, x, raw, k, v, do, lse, delta, scale, softcap)
    for first in range(full, length, BLOCK_P):
        k = load_keys(prefix_k, n, h_kv, first, length, D, BLOCK_P, BLOCK_D, TMA)
        v = load_keys(prefix_v, n, h_kv, first, length, D_V, BLOCK_P, BLOCK_DV, TMA)
        token = (first + tl.arange(0, BLOCK_P))[None, :]
        keep = token < length
        raw = dot(q, k.T)
        x = biased(logits(raw, scale, softcap), bank, n, h_kv, token, keep)
        if ids is not None:
            keep = keep & (ids == n)[:, None]
        x = tl.where(keep, x, float("-inf"))
        dq = add_dq(dq, x, raw, k, v, do, lse, delta, scale, softcap)
    return dq


@triton.jit(do_not_specialize=["q_start", "S", "T", "P", "H_kv"])
def _prefix_attn_bwd_dq_kernel(
    q, do,  # Strided [B, H, S, D], [B, H, S, D_v]
    k, v,  # Strided or descriptor [B, H_kv, T, D]
    prefix_k, prefix_v,  # Strided or descriptor [N, H_kv, P, D]
    dq,  # Strided [B, H, S, D]
    lse, delta,  # fp32 [B, H, S]
    mask, bank, q_start, scale, softcap, S, T, P, H_kv,
    G: tl.constexpr, D: tl.constexpr, D_V: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """One tile of packed rows. Grid: ``B * H_kv * cdiv(S * G, BLOCK_M)``, a sample's longest tiles first."""
    tiles = tl.cdiv(S * G, BLOCK_M)
    tile = tiles - 1 - tl.program_id(0) % tiles
    b = tl.program_id(0) // tiles // H_kv
    h_kv = tl.program_id(0) // tiles % H_kv
    s, g, row = packed_rows(tile * BLOCK_M, S, G, BLOCK_M)
    h = h_kv * G + g
    place = (b.to(tl.int64) * H_kv * G + h) * S + s
    q_tile = load_rows(q, b, h, s, row, D, BLOCK_D)
    do_tile = load_rows(do, b, h, s, row, D_V, BLOCK_DV)
    lse_i = load_lse(lse, place, row)
    delta_i = tl.load(delta + place, mask=row, other=0.0)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    if bank.ids_s is None:
        n = sample_prefix(bank, b)
        length = prefix_length(bank, n, P)
        acc = add_prefix_dq(acc, q_tile, do_tile, lse_i, delta_i, prefix_k, prefix_v, bank, n, h_kv, length, None,
                            scale, softcap, D, D_V, BLOCK_P, BLOCK_D, BLOCK_DV, TMA)  # fmt: skip
    else:
        ids = row_prefixes(bank, b, s, row)
        n = next_prefix(ids, -1)
        while n != NO_ID:
            length = prefix_length(bank, n, P)
            acc = add_prefix_dq(acc, q_tile, do_tile, lse_i, delta_i, prefix_k, prefix_v, bank, n, h_kv, length, ids,
                                scale, softcap, D, D_V, BLOCK_P, BLOCK_D, BLOCK_DV, TMA)  # fmt: skip
            n = next_prefix(ids, n)

    start = query_start(mask, q_start, b)
    pos = start + s
    first_pos = start + tile * BLOCK_M // G
    last_pos = start + tl.minimum(tile * BLOCK_M + BLOCK_M - 1, S * G - 1) // G
    low, full, high = key_range(first_pos, last_pos, T, mask.window, CAUSAL, MASKED, BLOCK_N)
    if mask.segments is not None:
        least, most = segment_ids(pos, row, b, T, mask)
        low, high = segment_range(low, high, 0, least, most, b, T, mask)
        low = low // BLOCK_N * BLOCK_N
        full = low
    if not MASKED:
        for first in range(low, full, BLOCK_N):
            k_tile = load_keys(k, b, h_kv, first, T, D, BLOCK_N, BLOCK_D, TMA)
            v_tile = load_keys(v, b, h_kv, first, T, D_V, BLOCK_N, BLOCK_DV, TMA)
            raw = dot(q_tile, k_tile.T)
            acc = add_dq(acc, logits(raw, scale, softcap), raw, k_tile, v_tile, do_tile, lse_i, delta_i, scale, softcap)
    for first in range(full, high, BLOCK_N):
        k_tile = load_keys(k, b, h_kv, first, T, D, BLOCK_N, BLOCK_D, TMA)
        v_tile = load_keys(v, b, h_kv, first, T, D_V, BLOCK_N, BLOCK_DV, TMA)
        key = (first + tl.arange(0, BLOCK_N))[None, :]
        raw = dot(q_tile, k_tile.T)
        x = logits(raw, scale, softcap)
        x = visible(x, b, h[:, None], s[:, None], row[:, None], key, pos[:, None], T, mask, CAUSAL)
        acc = add_dq(acc, x, raw, k_tile, v_tile, do_tile, lse_i, delta_i, scale, softcap)
    store_rows(dq, b, h, s, row, acc * scale, D, BLOCK_D)
