"""Launches of the backward. A kernel whose gradients are not needed is not launched."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..._triton.prefix_attn_bwd_delta import _prefix_attn_bwd_delta_kernel
from ..._triton.prefix_attn_bwd_dkdv import _prefix_attn_bwd_dkdv_kernel
from ..._triton.prefix_attn_bwd_dprefix import _prefix_attn_bwd_dprefix_kernel
from ..._triton.prefix_attn_bwd_dq import _prefix_attn_bwd_dq_kernel
from ...types import AttentionArgs, Grads, Needs
from . import kernel_args, launcher
from .kernel_args import constants, empty_bshd, key_sources, row_sources, row_tiles, tile_for
from .prefix_bank import rows_by_prefix, unit_is_token
from .split_reduce import Partials
from .tile_config import Tile

# A prefix of one or two tiles reads o itself; above, a pass for delta costs less than reading o again for each tile.
DELTA_INSIDE_UP_TO = 2


def fused(args: AttentionArgs, o: Tensor, lse: Tensor, do: Tensor, needs: Needs) -> Grads:
    """Gradients of the forward, given its merged ``o`` and ``lse``."""
    if args.q.numel() == 0:
        tensors = (args.q, args.k, args.v, args.prefix_k, args.prefix_v, args.bias, args.prefix_bias)
        asked = zip(tensors, needs, strict=True)
        return Grads(*(torch.zeros_like(x) if need and x is not None else None for x, need in asked))
    lse = lse.contiguous()
    content = needs.q or ((needs.k or needs.v) and args.k.shape[2] > 0)
    delta = _delta(args, o, do) if content or _prefix_tiles(args) > DELTA_INSIDE_UP_TO else None
    dq = dk = dv = None
    if needs.q:
        assert delta is not None
        dq = _dq(args, lse, delta, do)
    if needs.k or needs.v:
        dk, dv = _dkdv(args, lse, delta, do, needs)
    dprefix_k, dprefix_v, dbias = dprefix(args, o, lse, delta, do, needs)
    return Grads(q=dq, k=dk, v=dv, prefix_k=dprefix_k, prefix_v=dprefix_v, prefix_bias=dbias)


def _delta(args: AttentionArgs, o: Tensor, do: Tensor) -> Tensor:
    delta = args.q.new_empty(args.q.shape[:3], dtype=torch.float32)
    shape, tile = constants(args), Tile(BLOCK_M=64, num_warps=4, num_stages=1)
    launcher.launch(
        _prefix_attn_bwd_delta_kernel,
        row_tiles(args, tile),
        *(kernel_args.strided(do), kernel_args.strided(o), delta, args.q.shape[2], args.k.shape[1]),
        tile=tile,
        place=args.q,
        BLOCK_M=tile.BLOCK_M,
        **{name: shape[name] for name in ("G", "D_V", "BLOCK_DV")},
    )
    return delta


def _dq(args: AttentionArgs, lse: Tensor, delta: Tensor, do: Tensor) -> Tensor:
    dq = empty_bshd(args.q)
    mask, q_start, masked = kernel_args.mask(args)
    tile, tma, sources = key_sources(args, "bwd_dq")
    launcher.launch(
        _prefix_attn_bwd_dq_kernel,
        row_tiles(args, tile),
        *(kernel_args.strided(args.q), kernel_args.strided(do), *sources, kernel_args.strided(dq), lse, delta, mask),
        *(kernel_args.bank(args), q_start, args.scale, args.softcap, args.q.shape[2], args.k.shape[2]),
        *(args.num_prefix_tokens, args.k.shape[1]),
        tile=tile,
        place=args.q,
        CAUSAL=args.causal,
        MASKED=masked or not tile.SPLIT,
        BLOCK_M=tile.BLOCK_M,
        BLOCK_N=tile.BLOCK_N,
        BLOCK_P=kernel_args.prefix_block(args.num_prefix_tokens, tile.BLOCK_P),
        TMA=tma,
        **constants(args),
    )
    return dq


def _dkdv(args: AttentionArgs, lse: Tensor, delta: Tensor | None, do: Tensor, needs: Needs) -> tuple[Any, Any]:
    dk, dv = (empty_bshd(x) if need else None for x, need in ((args.k, needs.k), (args.v, needs.v)))
    mask, q_start, masked = kernel_args.mask(args)
    tile, tma, rows = row_sources(args, "bwd_dkdv", do)
    launcher.launch(
        _prefix_attn_bwd_dkdv_kernel,
        args.q.shape[0] * args.k.shape[1] * -(-args.k.shape[2] // tile.BLOCK_N),
        *(*rows, kernel_args.strided(args.k), kernel_args.strided(args.v)),
        *(None if x is None else kernel_args.strided(x) for x in (dk, dv)),
        *(lse, delta, mask, q_start, args.scale, args.softcap, args.q.shape[2], args.k.shape[2], args.k.shape[1]),
        tile=tile,
        place=args.q,
        CAUSAL=args.causal,
        MASKED=masked or not tile.SPLIT,
        NEED_K=needs.k,
        NEED_V=needs.v,
        BLOCK_M=tile.BLOCK_M,
        BLOCK_N=tile.BLOCK_N,
        TMA=tma,
        **constants(args),
    )
    return dk, dv


def _prefix_tiles(args: AttentionArgs) -> int:
    block = kernel_args.prefix_block(args.num_prefix_tokens, tile_for(args, "bwd_dprefix").BLOCK_P)
    return -(-args.num_prefix_tokens // block)


def dprefix(
    args: AttentionArgs, o: Tensor, lse: Tensor, delta: Tensor | None, do: Tensor, needs: Needs
) -> list[Tensor | None]:
    """Gradients of ``prefix_k``, ``prefix_v`` and ``prefix_bias``, in their dtypes; without ``delta``, from ``o``."""
    asked = (needs.prefix_k, needs.prefix_v, needs.prefix_bias)
    if not any(asked):
        return [None, None, None]
    prefix_k, prefix_v = kernel_args.prefix(args)
    tile, heads_kv, numbers, tokens = tile_for(args, "bwd_dprefix"), args.k.shape[1], len(prefix_k), prefix_k.shape[2]
    block_p = kernel_args.prefix_block(tokens, tile.BLOCK_P)
    programs = numbers * heads_kv * -(-tokens // block_p)
    rows = args.q.shape[0] * args.q.shape[2] * args.groups
    splits = min(-(-rows // tile.BLOCK_M), -(-2 * launcher.num_sms(args.q) // max(programs, 1)))
    tensors = (args.prefix_k, args.prefix_v, args.prefix_bias)
    partials = Partials(tensors, splits, asked, bank=args.prefix_k.dim() == 4)
    launcher.launch(
        _prefix_attn_bwd_dprefix_kernel,
        splits * programs,
        *(kernel_args.strided(args.q), kernel_args.strided(do), None if delta is not None else kernel_args.strided(o)),
        *(kernel_args.strided(prefix_k), kernel_args.strided(prefix_v), partials.k, partials.v, partials.bias),
        *(lse, delta),
        *(
            kernel_args.bank(args),
            rows_by_prefix(args),
            args.scale,
            args.softcap,
            args.q.shape[0],
            args.q.shape[2],
            tokens,
        ),
        *(numbers, heads_kv, splits),
        tile=tile,
        place=args.q,
        UNIT_IS_TOKEN=unit_is_token(args),
        NEED_K=needs.prefix_k,
        NEED_V=needs.prefix_v,
        NEED_BIAS=needs.prefix_bias,
        BLOCK_M=tile.BLOCK_M,
        BLOCK_P=block_p,
        **constants(args),
    )
    return partials.reduced()
