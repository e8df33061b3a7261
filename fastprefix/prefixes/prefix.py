"""``Prefix``, the trainable module that ``attach`` returns, and ``LayerSlot``, its place in an attention module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastprefix.errors import fail
from fastprefix.prefixes.config import LayerShape, Part, PrefixConfig
from fastprefix.prefixes.kv import DirectKV, PartEncoders, PrefixEncoder, ProjectedKV
from fastprefix.prefixes.modules import Modules


class Prefix(nn.Module):
    """All layers of one prefix.

    The prefix's layers are also children of the model's attention modules (and its encoder a child of the model), so
    that optimisers, FSDP and checkpoints find the parameters in the model. This module gives access to all of them.

    Attributes:
        config: the :class:`PrefixConfig` that the prefix was made from.
        layer_indices: indices of the attention layers that have the prefix, in execution order.
        parts: each layer's part of an encoder-decoder (``"encoder"``, ``"decoder"`` or ``"cross"``), else None.
        sources: for each of these layers, the layer whose content keys and values it reads: itself, unless shared.
        shapes: the :class:`LayerShape` of each of these layers.
        encoder: the MLP (in an encoder-decoder one for each part), or None when keys and values are trained directly.
        modules_to_save: the prefix's copies of the modules that ``config.modules_to_save`` names.
    """

    def __init__(
        self,
        config: PrefixConfig,
        shapes: Sequence[LayerShape],
        layer_indices: Sequence[int],
        parts: Sequence[Part | None] | None = None,
        sources: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.shapes = tuple(shapes)
        self.layer_indices = tuple(layer_indices)
        self.parts: tuple[Part | None, ...] = (None,) * len(self.shapes) if parts is None else tuple(parts)
        self.sources = tuple(layer_indices if sources is None else sources)
        self.encoder: PrefixEncoder | PartEncoders | None = None
        self.layers = nn.ModuleList()
        self.modules_to_save = Modules()

    @property
    def num_virtual_tokens(self) -> int:
        """Prefix tokens P."""
        return self.config.num_virtual_tokens

    @property
    def offset(self) -> int:
        """By how many positions the content after the prefix is shifted."""
        return self.num_virtual_tokens if self.config.position_offset == "after_prefix" else 0

    def devices(self) -> list[torch.device]:
        """Each layer's device."""
        return [layer()[0].device for layer in self.layers]

    def set_direct(self, keys: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        """Make these keys ``[H_kv, P, D]`` and values the parameters, without an MLP."""
        self.check(keys, values)
        self.encoder = None
        frozen = self.config.num_frozen_tokens
        self.layers = nn.ModuleList(DirectKV(k, v, frozen) for k, v in zip(keys, values, strict=True))

    def set_encoder(self, encoder: PrefixEncoder | PartEncoders) -> None:
        """Make an MLP's output the keys and values."""
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


class LayerKV(NamedTuple):
    """The prefix that one layer's attention reads in addition to its content."""

    k: Tensor  # [H_kv, P, D]; with ids a packed bank, where P is the sum of all prefixes' lengths
    v: Tensor  # [H_kv, P, D_v]
    ids: Tensor | None = None  # [B], the row's prefix in the bank, -1 = none
    lens: Tensor | None = None  # [N]
    gate: Tensor | None = None  # [H]


class LayerSlot(nn.Module):
    """A child of an attention module, which holds the layer's prefixes by name; at most one of them is active.

    During a forward ``override`` may replace the active prefix by other keys and values: a bank, or those that the
    model computed from a prompt.
    """

    def __init__(self) -> None:
        super().__init__()
        self.prefixes = nn.ModuleDict()
        self.active: str | None = None
        self.override: LayerKV | None = None
        self.is_overridden = False  # whether ``override`` (even if None) replaces the active prefix
        self.packed: Any = None  # while prompts and rows run as one text: its PackedPrompts
        self.capturing = False
        self.captured: tuple[Tensor, Tensor] | None = None  # the content's [B, H_kv, T, D], [B, H_kv, T, D_v]
        self.fallback_attention: str | None = None  # the content's implementation, with a gated prompt
        self.keeps_query = False
        self.query: Tensor | None = None  # [B, H, S, D]
        self.query_factor: Tensor | None = None  # [B or 1, 1, S, 1], see hf/attention/query_scaling.py
        self.ran = False  # whether the attention function was called, for the check after the first forward

    def set_override(self, kv: LayerKV | None) -> None:
        """Read these keys and values (None: no prefix) instead of the active prefix."""
        self._set_override(kv, True)

    def clear_override(self) -> None:
        """Read the active prefix again."""
        self._set_override(None, False)

    def _set_override(self, kv: LayerKV | None, is_overridden: bool) -> None:
        # Every layer's is set in every forward, and a module's own way looks for parameters and modules first.
        object.__setattr__(self, "override", kv)
        object.__setattr__(self, "is_overridden", is_overridden)

    def forward(self) -> LayerKV | None:
        """The keys and values that this layer reads; None where it has no prefix."""
        if self.is_overridden:
            return self.override
        if self.active is None:
            return None
        # This runs in every layer for every token, and a module's own attributes are found faster than its children.
        layer = self._modules["prefixes"]._modules.get(self.active)  # type: ignore[union-attr]
        if layer is None:
            return None
        k, v = layer() if is_hooked(layer) else layer.forward()
        return LayerKV(k, v)


def is_hooked(module: nn.Module) -> bool:
    """Whether a module has hooks, as FSDP's and pruning's. Without any its ``forward`` is called, which is faster."""
    return bool(
        module._forward_pre_hooks or module._forward_hooks or module._backward_hooks or module._backward_pre_hooks
    )
