"""Forward in one pass: the prefix's tiles first, then content that needs no mask, then the diagonal.

After the prefix the running maximum is finite, and its log-sum-exp is the prefix's share of the merged one for free.
FlashAttention-2 (Dao 2023) with one more loop.
"""

import triton
import triton.language as tl

from .primitives import (
    LOG2E,
    NO_ID,
    biased,
    dot,
    key_range,
    load_keys,
    load_rows,
    log_sum_exp,
    logits,
    next_prefix,
    online_softmax,
    packed_rows,
    prefix_length,
    query_start,
    row_prefixes,
    sample_prefix,
    segment_ids,
    segment_range,
    store_rows,
    visible,
)


@triton.jit
def attend_whole_tile(m_i, l_i, acc, raw, scale, softcap, v):
    """Raw products of a tile of keys that every row sees: the scale is a part of the softmax's multiply-add."""
    if softcap is None:
        return online_softmax(m_i, l_i, acc, raw, scale * LOG2E, v)
    else:
        return online_softmax(m_i, l_i, acc, logits(raw, scale, softcap), 1.0, v)


@triton.jit
def attend_prefix(m_i, l_i, acc, q, prefix_k, prefix_v, bank, n, h_kv, length, ids, scale, softcap,
                  D: tl.constexpr, D_V: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
                  BLOCK_DV: tl.constexpr, TMA: tl.constexpr):  # fmt: skip
    """All tokens of prefix ``n``, of which the last tile alone needs a mask; with ``ids [BLOCK_M]`` only for the rows
    that read it, which each tile masks.
    """
    full = 0
    if ids is None:
        full = length // BLOCK_P * BLOCK_P
    return attend_prefix_range(m_i, l_i, acc, q, prefix_k, prefix_v, bank, n, h_kv, 0, full, length, length, ids,
                               scale, softcap, D, D_V, BLOCK_P, BLOCK_D, BLOCK_DV, TMA)  # fmt: skip


@triton.jit
def attend_prefix_range(m_i, l_i, acc, q, prefix_k, prefix_v, bank, n, h_kv, low, full, high, length, ids, scale,
                        softcap, D: tl.constexpr, D_V: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
                        BLOCK_DV: tl.constexpr, TMA: tl.constexpr):  # fmt: skip
    """Tokens ``low`` to ``full`` of prefix ``n`` as they are, ``full`` to ``high`` through a mask."""
    if ids is None:
        for first in range(low, full, BLOCK_P):
            k = load_keys(prefix_k, n, h_kv, first, length, D, BLOCK_P, BLOCK_D, TMA)
            v = load_keys(prefix_v, n, h_kv, first, length, D_V, BLOCK_P, BLOCK_DV, TMA)
            if bank.bias is None:
                m_i, l_i, acc = attend_whole_tile(m_i, l_i, acc, dot(q, k.T), scale, softcap, v)
            else:
                token = (first + tl.arange(0, BLOCK_P))[None, :]
                x = biased(logits(dot(q, k.T), scale, softcap), bank, n, h_kv, token, token < length)
                m_i, l_i, acc = online_softmax(m_i, l_i, acc, x, 1.0, v)
    for first in range(full, high, BLOCK_P):
        k = load_keys(prefix_k, n, h_kv, first, length, D, BLOCK_P, BLOCK_D, TMA)
        v = load_keys(prefix_v, n, h_kv, first, length, D_V, BLOCK_P, BLOCK_DV, TMA)
        token = (first + tl.arange(0, BLOCK_P))[None, :]
        keep = token < length
        x = biased(logits(dot(q, k.T), scale, softcap), bank, n, h_kv, token, keep)
        if ids is not None:
            keep = keep & (ids == n)[:, None]
        m_i, l_i, acc = online_softmax(m_i, l_i, acc, tl.where(keep, x, float("-inf")), 1.0, v)
    return m_i, l_i, acc


@triton.jit
def attend_content(m_i, l_i, acc, q, k, v, b, h_kv, h, s, row, pos, low, full, high, T, mask, scale, softcap,
                   D: tl.constexpr, D_V: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr,
                   BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
                   TMA: tl.constexpr):  # fmt: skip
    """Keys ``low`` to ``full`` as they are, ``full`` to ``high`` through the mask."""
    if not MASKED:
        for first in range(low, full, BLOCK_N):
            k_tile = load_keys(k, b, h_kv, first, T, D, BLOCK_N, BLOCK_D, TMA)
            v_tile = load_keys(v, b, h_kv, first, T, D_V, BLOCK_N, BLOCK_DV, TMA)
            m_i, l_i, acc = attend_whole_tile(m_i, l_i, acc, dot(q, k_tile.T), scale, softcap, v_tile)
    for first in range(full, high, BLOCK_N):
        k_tile = load_keys(k, b, h_kv, first, T, D, BLOCK_N, BLOCK_D, TMA)
        v_tile = load_keys(v, b, h_kv, first, T, D_V, BLOCK_N, BLOCK_DV, TMA)
        key = (first + tl.arange(0, BLOCK_N))[None, :]
        x = logits(dot(q, k_tile.T), scale, softcap)
        x = visible(x, b, h[:, None], s[:, None], row[:, None], key, pos[:, None], T, mask, CAUSAL)
        m_i, l_i, acc = online_softmax(m_i, l_i, acc, x, 1.0, v_tile)
    return m_i, l_i, acc


@triton.jit(do_not_specialize=["q_start", "S", "T", "P", "H_kv"])
def _prefix_attn_fwd_kernel(
    q,  # Strided [B, H, S, D]
    k, v,  # Strided or descriptor [B, H_kv, T, D]
    prefix_k, prefix_v,  # Strided or descriptor [N, H_kv, P, D]
    o,  # Strided [B, H, S, D_v]
    lse,  # fp32 [B, H, S]
    prefix_lse,  # fp32 [B, H, S], or None: exp(prefix_lse - lse) is the mass on the prefix
    sinks,  # [H], or None
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
    q_tile = load_rows(q, b, h, s, row, D, BLOCK_D)
    # The running softmax wants scale >= 0; a sign is exact on q.
    q_tile = tl.where(scale < 0.0, -q_tile, q_tile)
    scale = tl.abs(scale)

    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    if bank.ids_s is None:
        n = sample_prefix(bank, b)
        length = prefix_length(bank, n, P)
        m_i, l_i, acc = attend_prefix(m_i, l_i, acc, q_tile, prefix_k, prefix_v, bank, n, h_kv, length, None, scale,
                                      softcap, D, D_V, BLOCK_P, BLOCK_D, BLOCK_DV, TMA)  # fmt: skip
    else:
        ids = row_prefixes(bank, b, s, row)
        n = next_prefix(ids, -1)
        while n != NO_ID:
            length = prefix_length(bank, n, P)
            m_i, l_i, acc = attend_prefix(m_i, l_i, acc, q_tile, prefix_k, prefix_v, bank, n, h_kv, length, ids, scale,
                                          softcap, D, D_V, BLOCK_P, BLOCK_D, BLOCK_DV, TMA)  # fmt: skip
            n = next_prefix(ids, n)
    place = (b.to(tl.int64) * H_kv * G + h) * S + s
    if prefix_lse is not None:
        tl.store(prefix_lse + place, log_sum_exp(m_i, l_i), mask=row)

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
    m_i, l_i, acc = attend_content(m_i, l_i, acc, q_tile, k, v, b, h_kv, h, s, row, pos, low, full, high, T, mask,
                                   scale, softcap, D, D_V, CAUSAL, MASKED, BLOCK_N, BLOCK_D, BLOCK_DV, TMA)  # fmt: skip

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
