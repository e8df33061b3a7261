"""``Prefix``: the trainable module that ``attach`` returns, and the slot that an attention module holds it in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastprefix.errors import fail
from fastprefix.prefixes.config import LayerShape, Part, PrefixConfig
from fastprefix.prefixes.kv import DirectKV, PartEncoders, PrefixEncoder, ProjectedKV
from fastprefix.prefixes.modules import Modules


class Prefix(nn.Module):
    """All layers of one prefix.

    Its layers are also children of the model's attention modules (and its encoder of the model), so that whatever
    walks the model - optimisers, FSDP, checkpoints - finds the parameters; this module is the handle on them.

    Attributes:
        config: the :class:`PrefixConfig` it was made from.
        layer_indices: the attention layers that have it, in the order in which they run.
        parts: what each of them is in an encoder-decoder (``"encoder"``, ``"decoder"`` or ``"cross"``); None elsewhere.
        sources: the layer whose content's keys and values each of them reads: its own, where layers share none.
        shapes: their geometry.
        encoder: the MLP (in an encoder-decoder one for each part), or None when keys and values are trained directly.
        modules_to_save: its own copies of the model's modules of ``config.modules_to_save``.
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
        """Train these keys ``[H_kv, P, D]`` and values themselves."""
        self.check(keys, values)
        self.encoder = None
        frozen = self.config.num_frozen_tokens
        self.layers = nn.ModuleList(DirectKV(k, v, frozen) for k, v in zip(keys, values, strict=True))

    def set_encoder(self, encoder: PrefixEncoder | PartEncoders) -> None:
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


class LayerKV(NamedTuple):
    """The prefix that one layer's attention reads in addition to its content."""

    k: Tensor  # [H_kv, P, D]; with ids a packed bank, P the sum of its prefixes' lengths
    v: Tensor  # [H_kv, P, D_v]
    ids: Tensor | None = None  # [B], the row's prefix in the bank, -1 = none
    lens: Tensor | None = None  # [N]
    gate: Tensor | None = None  # [H]


class LayerSlot(nn.Module):
    """The child of an attention module that holds the prefixes attached to it by name, one of them active or none.

    A forward may bring keys and values of its own (``override``): a bank, or those
    that the model computed from a prompt.
    """

    def __init__(self) -> None:
        super().__init__()
        self.prefixes = nn.ModuleDict()
        self.active: str | None = None
        self.override: LayerKV | None = None
        self.is_overridden = False  # whether ``override``, None included, is read instead of the active prefix
        self.capturing = False
        self.captured: tuple[Tensor, Tensor] | None = None  # the content's [B, H_kv, T, D], [B, H_kv, T, D_v]
        self.fallback_attention: str | None = None  # the implementation that the content keeps beside a gated prompt
        self.keeps_query = False
        self.query: Tensor | None = None  # [B, H, S, D]
        self.query_factor: Tensor | None = None  # [B or 1, 1, S, 1], see hf/attention/query_scaling.py
        self.ran = False  # whether the attention function was called, for the check after the first forward

    def set_override(self, kv: LayerKV | None) -> None:
        """Read these, or nothing, whichever prefix is active."""
        self.override, self.is_overridden = kv, True

    def clear_override(self) -> None:
        """Read the active prefix again."""
        self.override, self.is_overridden = None, False

    def forward(self) -> LayerKV | None:
        """What this layer reads, or None where it has no prefix."""
        if self.is_overridden:
            return self.override
        if self.active is None or self.active not in self.prefixes:
            return None
        return LayerKV(*self.prefixes[self.active]())
