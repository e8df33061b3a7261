"""Corrects queries that a layer scales by a position which it counts itself and which ignores the prefix.

Llama 4 scales so in its layers without rotary positions (temperature tuning, arXiv:2501.19399), by the token's index
in the cache. After a prefix, as after the same tokens in the context, that position is larger.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastprefix.hf.attention.function import SLOT


def _scales_queries(module: Any) -> bool:
    return bool(getattr(module, "attn_temperature_tuning", False)) and not getattr(module, "use_rope", True)


class QueryScaling:
    """Hooks on the attention modules that scale queries; each stores a correcting factor in the module's slot."""

    def __init__(self, modules: tuple[nn.Module, ...]) -> None:
        self.offset: int | Tensor = 0  # shift of the running forward's rows; [B, 1]
        self.handles = [
            m.register_forward_pre_hook(self.before, with_kwargs=True) for m in modules if _scales_queries(m)
        ]

    def before(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the module's forward: store the ratio of the scale at the shifted positions to the module's own."""
        slot: Any = module._modules[SLOT]
        slot.query_factor = None
        if isinstance(self.offset, int) and self.offset == 0:
            return
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]  # [B, S, d]
        cache = kwargs.get("past_key_values")
        past = 0 if cache is None else cache.get_seq_length(module.layer_idx)
        counted = (torch.arange(hidden.shape[1], device=hidden.device) + past)[None].float()  # [1, S]
        offset = self.offset.to(hidden.device) if isinstance(self.offset, Tensor) else self.offset
        factor = _scale(module, counted + offset) / _scale(module, counted)
        slot.query_factor = factor[:, None, :, None]  # [B or 1, 1, S, 1]

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self.handles:
            handle.remove()


def _scale(module: Any, positions: Tensor) -> Tensor:
    return torch.log1p(torch.floor((positions + 1.0) / module.floor_scale)) * module.attn_scale + 1.0
