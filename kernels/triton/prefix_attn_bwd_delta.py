"""``delta = rowsum(do * o)`` of every row, which the gradient kernels subtract from ``dA``."""

import triton
import triton.language as tl

from .primitives import load_rows, packed_rows


@triton.jit(do_not_specialize=["S", "H_kv"])
def _prefix_attn_bwd_delta_kernel(
    do, o,  # Strided [B, H, S, D_v]
    delta,  # fp32 [B, H, S]
    S, H_kv, G: tl.constexpr, D_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """One tile of packed rows. Grid: ``B * H_kv * cdiv(S * G, BLOCK_M)``."""
    tiles = tl.cdiv(S * G, BLOCK_M)
    tile = tl.program_id(0) % tiles
    b = tl.program_id(0) // tiles // H_kv
    h_kv = tl.program_id(0) // tiles % H_kv
    s, g, row = packed_rows(tile * BLOCK_M, S, G, BLOCK_M)
    h = h_kv * G + g
    do_tile = load_rows(do, b, h, s, row, D_V, BLOCK_DV).to(tl.float32)
    o_tile = load_rows(o, b, h, s, row, D_V, BLOCK_DV).to(tl.float32)
    tl.store(delta + (b.to(tl.int64) * H_kv * G + h) * S + s, tl.sum(do_tile * o_tile, 1), mask=row)
