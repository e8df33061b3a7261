"""dK and dV of the content: a program owns a tile of keys and walks the query rows of its group that see it.

Scores are held transposed, ``[BLOCK_N, BLOCK_M]``, so that both sums over rows are plain products.
"""

import triton
import triton.language as tl

from .primitives import (
    dot,
    load_keys,
    load_lse,
    load_packed,
    logits,
    packed_rows,
    query_start,
    segment_ids,
    segment_range,
    store_rows,
    through_softcap,
    visible,
)


@triton.jit
def row_range(first, last, start, S, window, G: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr,
              BLOCK_M: tl.constexpr):  # fmt: skip
    """Packed rows that see keys ``first`` to ``last``: ``[low, full)`` through a mask, ``[full, high)`` all of them."""
    low = 0
    full = 0
    high = S * G
    if CAUSAL:
        low = tl.minimum(S, tl.maximum(first - start, 0)) * G // BLOCK_M * BLOCK_M
        full = tl.cdiv(tl.minimum(S, tl.maximum(last - start, 0)) * G, BLOCK_M) * BLOCK_M
    if window is not None:
        high = tl.minimum(S, tl.maximum(last + window - start, 0)) * G
    if MASKED:
        full = high
    return low, tl.minimum(full, high), high


@triton.jit
def add_dkdv(dk, dv, q, k, v, do, delta, raw, x, lse, scale, softcap, NEED_K: tl.constexpr, NEED_V: tl.constexpr):
    """One tile of rows: logits ``x`` of ``raw`` products, ``[BLOCK_N, BLOCK_M]``."""
    p = tl.exp2(x - lse[None, :])
    if NEED_V:
        dv = dot(p.to(do.dtype), do, dv)
    if NEED_K:
        ds = p * (dot(v, do.T) - delta[None, :])
        ds = through_softcap(ds, raw, scale, softcap)
        dk = dot(ds.to(q.dtype), q, dk)
    return dk, dv


@triton.jit(do_not_specialize=["q_start", "S", "T", "H_kv"])
def _prefix_attn_bwd_dkdv_kernel(
    q, do,  # Strided [B, H, S, D], or descriptors of [B, S, H, D]
    k, v,  # Strided [B, H_kv, T, D]
    dk, dv,  # Strided [B, H_kv, T, D], or None
    lse, delta,  # fp32 [B, H, S]
    mask, q_start, scale, softcap, S, T, H_kv,
    G: tl.constexpr, D: tl.constexpr, D_V: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr,
    NEED_K: tl.constexpr, NEED_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """One tile of keys. Grid: ``B * H_kv * cdiv(T, BLOCK_N)``, the keys that most rows see first."""
    tiles = tl.cdiv(T, BLOCK_N)
    first_key = tl.program_id(0) % tiles * BLOCK_N
    b = tl.program_id(0) // tiles // H_kv
    h_kv = tl.program_id(0) // tiles % H_kv
    key = first_key + tl.arange(0, BLOCK_N)
    k_tile = load_keys(k, b, h_kv, first_key, T, D, BLOCK_N, BLOCK_D, False)
    v_tile = load_keys(v, b, h_kv, first_key, T, D_V, BLOCK_N, BLOCK_DV, False)
    dk_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_acc = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)

    start = query_start(mask, q_start, b)
    first_place = (b * H_kv + h_kv).to(tl.int64) * G * S
    last_key = tl.minimum(first_key + BLOCK_N, T) - 1
    low, full, high = row_range(first_key, last_key, start, S, mask.window, G, CAUSAL, MASKED, BLOCK_M)
    if mask.segments is not None:
        least, most = segment_ids(key, key < T, b, T, mask)
        first, last = segment_range(low // G, tl.cdiv(high, G), start, least, most, b, T, mask)
        low = first * G // BLOCK_M * BLOCK_M
        high = last * G
        full = high
    for first in range(low, full, BLOCK_M):
        s, g, row = packed_rows(first, S, G, BLOCK_M)
        h = h_kv * G + g
        place = first_place + g * S + s
        q_tile = load_packed(q, b, h_kv, first, S, G, D, BLOCK_M, BLOCK_D, TMA)
        do_tile = load_packed(do, b, h_kv, first, S, G, D_V, BLOCK_M, BLOCK_DV, TMA)
        lse_i = load_lse(lse, place, row)
        delta_i = tl.load(delta + place, mask=row, other=0.0)
        raw = dot(k_tile, q_tile.T)
        x = logits(raw, scale, softcap)
        x = visible(x, b, h[None, :], s[None, :], row[None, :], key[:, None], (start + s)[None, :], T, mask, CAUSAL)
        dk_acc, dv_acc = add_dkdv(dk_acc, dv_acc, q_tile, k_tile, v_tile, do_tile, delta_i, raw, x, lse_i, scale,
                                  softcap, NEED_K, NEED_V)  # fmt: skip
    if not MASKED:
        for first in range(full, high, BLOCK_M):
            s, g, row = packed_rows(first, S, G, BLOCK_M)
            place = first_place + g * S + s
            q_tile = load_packed(q, b, h_kv, first, S, G, D, BLOCK_M, BLOCK_D, TMA)
            do_tile = load_packed(do, b, h_kv, first, S, G, D_V, BLOCK_M, BLOCK_DV, TMA)
            lse_i = load_lse(lse, place, row)
            delta_i = tl.load(delta + place, mask=row, other=0.0)
            raw = dot(k_tile, q_tile.T)
            x = logits(raw, scale, softcap)
            dk_acc, dv_acc = add_dkdv(dk_acc, dv_acc, q_tile, k_tile, v_tile, do_tile, delta_i, raw, x, lse_i, scale,
                                      softcap, NEED_K, NEED_V)  # fmt: skip
    h_all = key * 0 + h_kv
    if NEED_K:
        store_rows(dk, b, h_all, key, key < T, dk_acc * scale, D, BLOCK_D)
    if NEED_V:
        store_rows(dv, b, h_all, key, key < T, dv_acc, D_V, BLOCK_DV)
