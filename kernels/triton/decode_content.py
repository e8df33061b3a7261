"""Decoding, the content's part: splits of one sample's keys (Dao et al. 2023, Flash-Decoding), through every mask."""

import triton
import triton.language as tl

from .kv_splits import split_range, store_state
from .prefix_attn_fwd import attend_content
from .primitives import key_range, load_rows, packed_rows, query_start, segment_ids, segment_range


@triton.jit(do_not_specialize=["q_start", "S", "T", "rows", "splits", "first_split", "H_kv"])
def _prefix_attn_decode_content_kernel(
    q,  # Strided [B, H, S, D]
    k, v,  # Strided or descriptor [B, H_kv, T, D]
    partial_acc,  # fp32 [first_split + splits, B * H * S, D_v]
    partial_m, partial_l,  # fp32 [first_split + splits, B * H * S]
    mask, q_start, scale, softcap, S, T, H_kv, rows, splits, first_split,
    G: tl.constexpr, D: tl.constexpr, D_V: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """One tile of packed rows, one split of the keys they see. Grid: ``B * H_kv * splits * cdiv(S * G, BLOCK_M)``."""
    tiles = tl.cdiv(S * G, BLOCK_M)
    tile = tl.program_id(0) % tiles
    split = tl.program_id(0) // tiles % splits
    h_kv = tl.program_id(0) // tiles // splits % H_kv
    b = tl.program_id(0) // tiles // splits // H_kv
    s, g, row = packed_rows(tile * BLOCK_M, S, G, BLOCK_M)
    h = h_kv * G + g
    q_tile = load_rows(q, b, h, s, row, D, BLOCK_D)
    # The running softmax wants scale >= 0; a sign is exact on q.
    q_tile = tl.where(scale < 0.0, -q_tile, q_tile)
    scale = tl.abs(scale)

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
    # The keys of these rows end at `high`. A cache's slots after it may never have been written and are not read.
    keys = high
    low, full, high = split_range(low, full, high, split, splits, BLOCK_N)

    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    m_i, l_i, acc = attend_content(m_i, l_i, acc, q_tile, k, v, b, h_kv, h, s, row, pos, low, full, high, keys, mask,
                                   scale, softcap, D, D_V, CAUSAL, MASKED, BLOCK_N, BLOCK_D, BLOCK_DV, TMA)  # fmt: skip
    place = (b * H_kv * G + h) * S + s
    store_state(partial_acc, partial_m, partial_l, first_split + split, rows, place, row, m_i, l_i, acc, D_V,
                BLOCK_DV)  # fmt: skip
