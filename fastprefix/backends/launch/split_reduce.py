"""The prefix's gradients in two stages: fp32 partials of each split, then their sum. No atomics, so the same bits."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._triton.prefix_attn_bwd_reduce import _prefix_attn_bwd_reduce_kernel
from . import launcher
from .tile_config import Tile

BLOCK = 1024


class Partials:
    """Room for the gradients of ``prefix_k`` and ``prefix_v`` over a number of splits.

    A kernel writes ``k`` and ``v``, ``[splits, N, H_kv, P, D]`` contiguous (None where not needed); with one split
    they are the gradients themselves, in the prefix's dtype, else fp32.
    """

    def __init__(self, prefix_k: Tensor, prefix_v: Tensor, splits: int, need_k: bool, need_v: bool) -> None:
        self.splits = splits
        self._out = [
            torch.empty_like(x, memory_format=torch.contiguous_format) if need else None
            for x, need in ((prefix_k, need_k), (prefix_v, need_v))
        ]
        self.k, self.v = (self._room(x) for x in self._out)

    def _room(self, out: Tensor | None) -> Tensor | None:
        if out is None:
            return None
        bank = out if out.dim() == 4 else out.unsqueeze(0)
        if self.splits == 1:
            return bank.unsqueeze(0)
        return out.new_empty(self.splits, *bank.shape, dtype=torch.float32)

    def reduced(self) -> tuple[Tensor | None, Tensor | None]:
        """The gradients, in the prefix's shape and dtype."""
        out_k, out_v = self._out
        sizes = [0 if x is None else x.numel() for x in self._out]
        if self.splits > 1 and max(sizes):
            place = self.k if self.k is not None else self.v
            assert place is not None
            launcher.launch(
                _prefix_attn_bwd_reduce_kernel,
                -(-max(sizes) // BLOCK),
                *(self.k, self.v, out_k, out_v, self.splits, *sizes),
                tile=Tile(num_warps=4, num_stages=1),
                place=place,
                BLOCK=BLOCK,
            )
        return out_k, out_v
