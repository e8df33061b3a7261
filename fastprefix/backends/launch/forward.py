"""Forward: fused, or split over keys where there are too few rows to fill the machine."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._triton.prefix_attn_fwd import _prefix_attn_fwd_kernel
from ...types import AttentionArgs
from . import kernel_args, launcher, split_kv_decode
from .kernel_args import constants, empty_bshd, key_sources, row_tiles


def fwd(args: AttentionArgs, prefix_lse: Tensor | None = None, route: str | None = None) -> tuple[Tensor, Tensor]:
    """``o`` and ``lse``; the prefix's own log-sum-exp ``[B, H, S]`` is written where it is asked for.

    ``route``: ``fused`` or ``split``; by shapes without one.
    """
    split = split_kv_decode.preferred(args) if route is None else route == "split"
    return split_kv_decode.fwd(args, prefix_lse) if split else fused(args, prefix_lse)


def fused(args: AttentionArgs, prefix_lse: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Both in one launch: each program walks all keys of its rows."""
    o, lse = outputs(args)
    if o.numel() == 0:
        return o, lse
    mask, q_start, masked = kernel_args.mask(args)
    tile, tma, sources = key_sources(args, "fwd")
    launcher.launch(
        _prefix_attn_fwd_kernel,
        row_tiles(args, tile),
        *(kernel_args.strided(args.q), *sources, kernel_args.strided(o), lse, prefix_lse, args.sinks, mask),
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
    return o, lse


def outputs(args: AttentionArgs) -> tuple[Tensor, Tensor]:
    """Room for ``o [B, H, S, D_v]`` in [B, S, H, D_v] storage and ``lse [B, H, S]``."""
    return empty_bshd(args.q, args.v.shape[3]), args.q.new_empty(args.q.shape[:3], dtype=torch.float32)
