"""``PrefixMemoryConfig`` and ``MemoryLayer``: a matrix of each head, from queries to what is added to the output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastprefix.prefixes.config import LayerShape, Part, PositionOffset, PrefixConfig, checked_modules
from fastprefix.prefixes.kv import LayerKV, PrefixLayer


@dataclass
class PrefixMemoryConfig:
    """The prefix as a memory (Prefix-Tuning+, arXiv:2506.13674): ``o = o_content + phi(q)^T M``, phi = elu.

    Each layer trains a matrix ``M [H, D, D_v]``, one for each query head, that starts at zero: training starts from the
    model's own outputs. There is no softmax over a prefix, so the term does not take attention from the content. ``q``
    is the layer's query as attention reads it, with rotary positions where the model has them, and not scaled.

    Args:
        layers: indices of the attention layers that get a memory, in execution order; default all.
        parts: of an encoder-decoder, as in :class:`PrefixConfig`.
        modules_to_save: modules of the model that are trained and saved with it, as in :class:`PrefixConfig`.

    Raises:
        ValueError: a field is out of range; the message names it.
    """

    layers: Sequence[int] | None = None
    parts: Sequence[Part] | None = None
    modules_to_save: Sequence[str] | None = None

    num_virtual_tokens: ClassVar[int] = 0
    position_offset: ClassVar[PositionOffset] = "none"
    num_frozen_tokens: ClassVar[int] = 0
    prefix_projection: ClassVar[bool] = False
    gate: ClassVar[None] = None

    def __post_init__(self) -> None:
        self.modules_to_save = checked_modules(self.modules_to_save)
        places = self._places()
        self.layers, self.parts = places.layers, places.parts

    def _places(self) -> PrefixConfig:
        return PrefixConfig(1, layers=self.layers, parts=self.parts)

    def to_json(self) -> dict[str, Any]:
        """The fields as plain data."""
        return {
            "num_virtual_tokens": 0,
            "layers": None if self.layers is None else list(self.layers),
            "parts": None if self.parts is None else list(self.parts),
            "modules_to_save": None if self.modules_to_save is None else list(self.modules_to_save),
        }

    def active_layers(self, parts: Sequence[Part | None]) -> list[int]:
        """Sorted indices of the layers that get a memory; ValueError where the model has no such layer."""
        return self._places().active_layers(parts)


class MemoryLayer(PrefixLayer):
    """One layer's memory ``M [H, D, D_v]``, without keys and values."""

    def __init__(self, num_heads: int, shape: LayerShape, device: torch.device) -> None:
        super().__init__()
        self.num_kv_heads = shape.num_kv_heads
        self.memory = nn.Parameter(torch.zeros(num_heads, shape.head_dim, shape.value_dim, device=device))

    def key_values(self) -> tuple[Tensor, Tensor]:
        """``[H_kv, 0, D]`` and ``[H_kv, 0, D_v]``."""
        _, dim, value_dim = self.memory.shape
        return self.memory.new_empty(self.num_kv_heads, 0, dim), self.memory.new_empty(self.num_kv_heads, 0, value_dim)

    def extras(self) -> dict[str, Tensor]:
        """The memory."""
        return {"memory": self.memory}

    def forward(self) -> LayerKV:
        """No keys and values, and the memory."""
        k, v = self.key_values()
        return LayerKV(self.own_heads(k), self.own_heads(v), memory=self.own_heads(self.memory))


def add_memory(o: Tensor, q: Tensor, memory: Tensor) -> Tensor:
    """``o [B, H, S, D_v] + elu(q)^T M`` for queries ``[B, H, S, D]``; of the two, q alone is kept for the backward."""
    if torch._C._are_functorch_transforms_active():  # which take no Function of this form
        return o + nn.functional.elu(q).to(o.dtype) @ memory.to(o.dtype)
    return _AddMemory.apply(o, q, memory)


class _AddMemory(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, o: Tensor, q: Tensor, memory: Tensor) -> Tensor:
        ctx.save_for_backward(q, memory)
        return o + nn.functional.elu(q).to(o.dtype) @ memory.to(o.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        q, memory = ctx.saved_tensors
        needs_o, needs_q, needs_memory = ctx.needs_input_grad
        dq = dmemory = None
        if needs_q:
            # elu'(x) is 1 above zero, and e^x below.
            dq = (do @ memory.to(do.dtype).transpose(1, 2)).to(q.dtype) * q.clamp(max=0.0).exp()
        if needs_memory:
            # [H, D, B * S] @ [H, B * S, D_v]: the rows of all samples are summed by the product itself.
            phi, rows = (x.transpose(0, 1).flatten(1, 2) for x in (nn.functional.elu(q).to(do.dtype), do))
            dmemory = (phi.transpose(1, 2) @ rows).to(memory.dtype)
        return do if needs_o else None, dq, dmemory
