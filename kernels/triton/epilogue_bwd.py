"""Backward of a short prefix after a vendor backward: its dq added in place to the content's, and dPrefix.

One pass over memory: q, do, o and lse are read once, dq is read and written once. The prefix is one tile and its
gradients stay in registers, so each program walks through a stretch of rows and writes one partial.
"""

import triton
import triton.language as tl

from .flat_rows import flat_rows
from .kernel_structs import Order
from .prefix_attn_bwd_dprefix import store_partial
from .primitives import dot, load_keys, load_lse, load_rows, logits, store_rows, through_softcap


@triton.jit(do_not_specialize=["B", "S", "P", "tiles", "H_kv"])
def _prefix_attn_epilogue_bwd_kernel(
    q,  # Strided [B, H, S, D]
    prefix_k, prefix_v,  # Strided [1, H_kv, P, D], P <= BLOCK_P
    o,  # Strided [B, H, S, D_v], the merged one; None where neither dq nor partial_k is
    lse,  # fp32 [B, H, S], the merged one
    do,  # Strided [B, H, S, D_v]
    dq,  # Strided [B, H, S, D], or None
    partial_k, partial_v,  # [splits, H_kv, P, D], or None
    scale, softcap, B, S, P, H_kv, tiles,
    G: tl.constexpr, D: tl.constexpr, D_V: tl.constexpr, ADD: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """A stretch of ``tiles`` tiles of the batch's rows. Grid: ``splits * H_kv``. ADD: to what is in dq."""
    h_kv = tl.program_id(0) % H_kv
    split = tl.program_id(0) // H_kv
    keep = (tl.arange(0, BLOCK_P) < P)[None, :]
    n = tl.zeros_like(h_kv)
    k = load_keys(prefix_k, n, h_kv, 0, P, D, BLOCK_P, BLOCK_D, False)
    v = load_keys(prefix_v, n, h_kv, 0, P, D_V, BLOCK_P, BLOCK_DV, False)
    # All products of the prefix's size are taken transposed: BLOCK_P as their rows would be too few for wgmma.
    dprefix_k = tl.zeros([BLOCK_D, BLOCK_P], tl.float32)
    dprefix_v = tl.zeros([BLOCK_DV, BLOCK_P], tl.float32)
    first = split * tiles
    for tile in range(first, tl.minimum(first + tiles, tl.cdiv(B * S * G, BLOCK_M))):
        b, s, g, row = flat_rows(Order(None, None), 0, tile * BLOCK_M, B, S, G, False, BLOCK_M)
        h = h_kv * G + g
        q_tile = load_rows(q, b, h, s, row, D, BLOCK_D)
        do_tile = load_rows(do, b, h, s, row, D_V, BLOCK_DV)
        if o is not None:
            o_tile = load_rows(o, b, h, s, row, D_V, BLOCK_DV)
            delta = tl.sum(do_tile.to(tl.float32) * o_tile.to(tl.float32), 1)
        m = load_lse(lse, (b.to(tl.int64) * H_kv * G + h) * S + s, row)
        raw = dot(q_tile, k.T)  # [BLOCK_M, BLOCK_P]
        p = tl.where(keep, tl.exp2(logits(raw, scale, softcap) - m[:, None]), 0.0)
        if partial_v is not None:
            dprefix_v = dot(do_tile.T, p.to(do_tile.dtype), dprefix_v)
        if o is not None:
            ds = through_softcap(p * (dot(do_tile, v.T) - delta[:, None]), raw, scale, softcap)
            ds = ds.to(q_tile.dtype)
            if dq is not None:
                # Taller than wide, like the others: else mma.sync gives every warp all rows and spills.
                dq_tile = dot(k.T, ds.T).T * scale
                if ADD:
                    dq_tile += load_rows(dq, b, h, s, row, D, BLOCK_D).to(tl.float32)
                store_rows(dq, b, h, s, row, dq_tile, D, BLOCK_D)
            if partial_k is not None:
                dprefix_k = dot(q_tile.T, ds, dprefix_k)
    slot = split * H_kv + h_kv
    if partial_k is not None:
        store_partial(partial_k, dprefix_k * scale, slot, 0, P, P, D, BLOCK_P, BLOCK_D, True)
    if partial_v is not None:
        store_partial(partial_v, dprefix_v, slot, 0, P, P, D_V, BLOCK_P, BLOCK_DV, True)
