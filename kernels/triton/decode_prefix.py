"""Decoding, the prefix's part: each tile of the prefix is read once for the rows of the whole batch.

One token of each of 256 samples with their own copies of a prefix reads it 256 times; here it is a matrix product with
256 * G rows (Juravsky et al. 2024, Hydragen). Splits of the prefix fill the rest of the machine.
"""

import triton
import triton.language as tl

from .flat_rows import count_rows, flat_rows
from .kv_splits import split_range, store_state
from .prefix_attn_fwd import attend_prefix_range
from .primitives import load_rows, prefix_length


@triton.jit
def find_tile(order, tile, B, S, N, G: tl.constexpr, UNIT_IS_TOKEN: tl.constexpr, BLOCK_M: tl.constexpr,
              BLOCK_BANK: tl.constexpr):  # fmt: skip
    """Prefix and first row of a tile, of all prefixes' tiles in turn; -1 past the last: the host knows only a bound."""
    if order.units is None:
        return tile * 0, tile * BLOCK_M
    else:
        n = tl.arange(0, BLOCK_BANK)
        begin = tl.load(order.first + n, mask=n < N, other=0)
        end = tl.load(order.first + n + 1, mask=n < N, other=0)
        rows = (end - begin).to(tl.int32) * G
        if not UNIT_IS_TOKEN:
            rows = rows * S
        tiles = tl.cdiv(rows, BLOCK_M)
        mine = tl.sum((tl.cumsum(tiles, 0) <= tile).to(tl.int32), 0)
        before = tl.sum(tl.where(n < mine, tiles, 0), 0)
        return tl.where(mine < N, mine, -1), (tile - before) * BLOCK_M


@triton.jit(do_not_specialize=["B", "S", "P", "N", "tiles", "rows", "splits", "H_kv"])
def _prefix_attn_decode_prefix_kernel(
    q,  # Strided [B, H, S, D]
    prefix_k, prefix_v,  # Strided or descriptor [N, H_kv, P, D]
    partial_acc,  # fp32 [splits, B * H * S, D_v]
    partial_m, partial_l,  # fp32 [splits, B * H * S]
    order, bank, scale, softcap, B, S, P, N, H_kv, tiles, rows, splits,
    G: tl.constexpr, D: tl.constexpr, D_V: tl.constexpr, UNIT_IS_TOKEN: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_BANK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """One tile of rows that read the same prefix, one split of it. Rows without a prefix are in no tile.

    Grid: ``splits * H_kv * tiles``; tiles of rows that read the same keys run side by side.
    """
    tile = tl.program_id(0) % tiles
    h_kv = tl.program_id(0) // tiles % H_kv
    split = tl.program_id(0) // tiles // H_kv
    n, first = find_tile(order, tile, B, S, N, G, UNIT_IS_TOKEN, BLOCK_M, BLOCK_BANK)
    length = prefix_length(bank, n, P)
    if order.units is not None:
        first = tl.where(n < 0, count_rows(order, 0, B, S, G, UNIT_IS_TOKEN), first)
        n = tl.maximum(n, 0)
    b, s, g, row = flat_rows(order, n, first, B, S, G, UNIT_IS_TOKEN, BLOCK_M)
    h = h_kv * G + g
    q_tile = load_rows(q, b, h, s, row, D, BLOCK_D)
    # The running softmax wants scale >= 0; a sign is exact on q.
    q_tile = tl.where(scale < 0.0, -q_tile, q_tile)
    scale = tl.abs(scale)

    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    low, full, high = split_range(0, length // BLOCK_P * BLOCK_P, length, split, splits, BLOCK_P)
    m_i, l_i, acc = attend_prefix_range(m_i, l_i, acc, q_tile, prefix_k, prefix_v, bank, n, h_kv, low, full, high,
                                        length, None, scale, softcap, D, D_V, BLOCK_P, BLOCK_D, BLOCK_DV,
                                        TMA)  # fmt: skip
    b, s, g, row = flat_rows(order, n, first, B, S, G, UNIT_IS_TOKEN, BLOCK_M, True)
    place = (b * H_kv * G + h_kv * G + g) * S + s
    store_state(partial_acc, partial_m, partial_l, split, rows, place, row, m_i, l_i, acc, D_V, BLOCK_DV)
