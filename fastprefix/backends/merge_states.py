"""Partial attention states: ``lse = logaddexp(lse_a, lse_b)``, ``o = exp(lse_a - lse) o_a + exp(lse_b - lse) o_b``.

Chunked-softmax merging as in FlashAttention (Dao et al. 2022). A part that sees nothing has ``lse = -inf``
and any finite ``o``.
"""

from __future__ import annotations

import torch
from torch import Tensor


def merge_state(o_a: Tensor, lse_a: Tensor, o_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Merge two states. ``o_a [B, H, S, D_v]`` is overwritten; ``lse [B, H, S]``."""
    lse, mass_b = merge_lse(lse_a, lse_b)
    return mix_outputs(o_a, o_b, mass_b), lse


def merge_lse(lse_a: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """``lse [B, H, S]`` of both and b's share of it, ``[B, H, S, 1]``."""
    lse = torch.logaddexp(lse_a, lse_b)
    # A row that sees nothing in either part keeps lse = -inf; shifting by 0 there leaves weight 0 instead of nan.
    return lse, torch.exp(lse_b - lse.masked_fill(lse == float("-inf"), 0.0)).unsqueeze(-1)


def mix_outputs(o_a: Tensor, o_b: Tensor, mass_b: Tensor) -> Tensor:
    """``(1 - mass_b) * o_a + mass_b * o_b``, written to ``o_a``."""
    if o_a.dtype == mass_b.dtype:
        return o_a.lerp_(o_b, mass_b)
    return o_a.copy_(torch.lerp(o_a.to(mass_b.dtype), o_b.to(mass_b.dtype), mass_b))


def add_sink(o: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """Merge with attention sinks: a part with ``o = 0`` and ``lse = sinks [H]``. ``o`` is overwritten."""
    total = torch.logaddexp(lse, sinks.to(lse.dtype)[None, :, None])
    mass = torch.exp(lse - total.masked_fill(total == float("-inf"), 0.0))
    return o.mul_(mass.unsqueeze(-1).to(o.dtype)), total
