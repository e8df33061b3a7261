"""``Prefix``: the trainable module that ``attach`` returns, and the slot that an attention module holds it in."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastprefix.prefixes.config import LayerShape, PrefixConfig
from fastprefix.prefixes.kv import DirectKV, PrefixEncoder, ProjectedKV
from fastprefix.validation import fail


class Prefix(nn.Module):
    """All layers of one prefix.

    Its layers are also children of the model's attention modules (and its encoder of the model), so that whatever
    walks the model - optimisers, FSDP, checkpoints - finds the parameters; this module is the handle on them.

    Attributes:
        config: the :class:`PrefixConfig` it was made from.
        layer_indices: the attention layers that have it, in the model's order.
        shapes: their geometry.
        encoder: the MLP, or None when keys and values are trained directly.
    """

    def __init__(self, config: PrefixConfig, shapes: Sequence[LayerShape], layer_indices: Sequence[int]) -> None:
        super().__init__()
        self.config = config
        self.shapes = tuple(shapes)
        self.layer_indices = tuple(layer_indices)
        self.encoder: PrefixEncoder | None = None
        self.layers = nn.ModuleList()

    @property
    def num_virtual_tokens(self) -> int:
        """Prefix tokens P."""
        return self.config.num_virtual_tokens

    def devices(self) -> list[torch.device]:
        """Each layer's device."""
        return [layer()[0].device for layer in self.layers]

    def set_direct(self, keys: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        """Train these keys ``[H_kv, P, D]`` and values themselves."""
        self.check(keys, values)
        self.encoder = None
        frozen = self.config.num_frozen_tokens
        self.layers = nn.ModuleList(DirectKV(k, v, frozen) for k, v in zip(keys, values, strict=True))

    def set_encoder(self, encoder: PrefixEncoder) -> None:
        """Train an MLP that gives them."""
        self.encoder = encoder
        self.layers = nn.ModuleList(ProjectedKV(encoder, i) for i in range(len(self.shapes)))

    def key_values(self) -> list[tuple[Tensor, Tensor]]:
        """Keys ``[H_kv, P, D]`` and values ``[H_kv, P, D_v]`` of each layer, with their gradients."""
        return [layer() for layer in self.layers]

    def check(self, keys: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        """Raise ValueError unless there are P keys and values of the right shape for every layer."""
        if len(keys) != len(self.shapes) or len(values) != len(self.shapes):
            raise fail(
                "init", f"{len(keys)} keys and {len(values)} values", f"one of each for {len(self.shapes)} layers"
            )
        P = self.num_virtual_tokens
        for i, (k, v, s) in enumerate(zip(keys, values, self.shapes, strict=True)):
            for name, x, dim in (("keys", k, s.head_dim), ("values", v, s.value_dim)):
                if tuple(x.shape) != (s.num_kv_heads, P, dim):
                    want = f"[H_kv, P, D] = {[s.num_kv_heads, P, dim]} in layer {self.layer_indices[i]}"
                    raise fail(name, f"shape {list(x.shape)}", want)


class LayerSlot(nn.Module):
    """What an attention module holds: the prefixes attached to it by name, one of them active or none."""

    def __init__(self) -> None:
        super().__init__()
        self.prefixes = nn.ModuleDict()
        self.active: str | None = None
        self.ran = False  # whether the attention function has come by, for the check after the first forward

    def forward(self) -> tuple[Tensor, Tensor] | None:
        """The active prefix's keys and values, or None where this layer has none."""
        if self.active is None or self.active not in self.prefixes:
            return None
        k, v = self.prefixes[self.active]()
        return k, v
