"""The prefix's gradients in two stages: fp32 partials of each split, then their sum. No atomics, so the same bits."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._triton.prefix_attn_bwd_reduce import _prefix_attn_bwd_reduce_kernel
from . import launcher
from .tile_config import Tile

BLOCK = 1024


class Partials:
    """Room for the gradients of ``prefix_k``, ``prefix_v`` and their bias over a number of splits.

    A kernel writes ``k`` and ``v``, ``[splits, N, H_kv, P, D]``, and ``bias``, ``[splits, N, H_kv, P]``, contiguous
    (None where not needed); with one split they are the gradients themselves, in the tensors' own dtype, else fp32.
    """

    def __init__(self, tensors: tuple[Tensor | None, ...], splits: int, needs: tuple[bool, ...], bank: bool) -> None:
        """``tensors``: prefix_k, prefix_v and its bias, with ``bank`` the dimension of N in front."""
        self.splits = splits
        self.out = [
            torch.empty_like(x, memory_format=torch.contiguous_format) if need and x is not None else None
            for x, need in zip(tensors, needs, strict=True)
        ]
        self.k, self.v, self.bias = self._rooms = [self._room(x, bank) for x in self.out]

    def _room(self, out: Tensor | None, bank: bool) -> Tensor | None:
        if out is None:
            return None
        numbered = out if bank else out.unsqueeze(0)
        if self.splits == 1:
            return numbered.unsqueeze(0)
        return out.new_empty(self.splits, *numbered.shape, dtype=torch.float32)

    def reduced(self) -> list[Tensor | None]:
        """The gradients, in the tensors' shape and dtype."""
        sizes = [0 if x is None else x.numel() for x in self.out]
        if self.splits > 1 and max(sizes):
            launcher.launch(
                _prefix_attn_bwd_reduce_kernel,
                -(-max(sizes) // BLOCK),
                *(*self._rooms, *self.out, self.splits, *sizes),
                tile=Tile(num_warps=4, num_stages=1),
                place=next(x for x in self._rooms if x is not None),
                BLOCK=BLOCK,
            )
        return self.out
