"""``prefix_mass``: how much of each token's attention is on the prefix."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastprefix.analysis.forward import Layer, look
from fastprefix.analysis.result import Result, figure, heat_map, plain, stacked
from fastprefix.errors import fail


@dataclass(frozen=True)
class PrefixMass(Result):
    """The share of attention that the prefix has, ``m = exp(lse_p - lse)``, from 0 to 1.

    Attributes:
        layers: names of the attention modules that read a prefix, in execution order.
        parts: each one's part of an encoder-decoder, else None.
        mass: one tensor ``[B, H, S]`` for each of these layers, on the CPU; nan where a row is padding.
    """

    layers: tuple[str, ...]
    parts: tuple[str | None, ...]
    mass: tuple[Tensor, ...]

    def by_head(self) -> Tensor:
        """``[L, H]``, the mean over all tokens that are not padding; nan where a layer has fewer heads than others."""
        return stacked(tuple(m.transpose(0, 1).flatten(1).nanmean(1) for m in self.mass))

    def by_layer(self) -> Tensor:
        """``[L]``, the mean over heads and tokens."""
        return torch.stack([m.nanmean() for m in self.mass])

    def by_token(self, part: str | None = None) -> Tensor:
        """``[L, B, S]``, the mean over heads; ``part`` of an encoder-decoder. nan at padding.

        Raises:
            ValueError: no layer of that part reads a prefix.
        """
        found = [m.mean(1) for m, own in zip(self.mass, self.parts, strict=True) if own == part]
        if not found:
            raise fail("part", repr(part), f"one of {sorted(set(map(repr, self.parts)))}")
        return torch.stack(found)

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain data, with ``by_head`` and ``by_layer``."""
        return {**super().to_dict(), "by_head": plain(self.by_head()), "by_layer": plain(self.by_layer())}

    def plot(self) -> Any:
        """Layers by heads, and layers by the tokens of the first row."""
        made = figure(9.6, 0.16 * len(self.layers) + 2.4)
        heads, tokens = made.subplots(1, 2)
        heat_map(heads, self.by_head(), vmin=0.0, vmax=1.0)
        heads.set(title="mean mass on the prefix", xlabel="head", ylabel="layer")
        heat_map(tokens, stacked(tuple(m[0].mean(0) for m in self.mass)), vmin=0.0, vmax=1.0)
        tokens.set(title="first row, mean over heads", xlabel="token", ylabel="layer")
        return made


def prefix_mass(model: Any, batch: Mapping[str, Any], name: str | None = None) -> PrefixMass:
    """The mass on the prefix by layer, head and position (Petrov et al. 2024, 2310.19698).

    It is computed from two log-sum-exps of the operator, ``sigmoid(lse_p - lse_c)``, and so with any backend. A sink
    that a model has counts as content. No attention matrix is held: a layer keeps ``[B, H, S]``.

    Args:
        model: with a prefix attached (or a patched PEFT model). It runs in eval mode, without gradients.
        batch: the keyword arguments of the model's forward, as a tokenizer returns them. An ``attention_mask [B, S]``
            (of an encoder-decoder's decoder, ``decoder_attention_mask``) tells what is padding.
        name: of the prefix; None for the active one, or those of an open :func:`fastprefix.prefix_batch` block.

    Returns:
        :class:`PrefixMass`, in fp32, or fp64 of an fp64 model.

    Raises:
        ValueError: the model has no such prefix, the prefix shares no softmax with the content (gated prefixes,
            memories), or a soft prompt runs inside the rows; or the batch does not fit. The message names the argument.
    """
    names: list[str] = []
    parts: list[str | None] = []
    mass: list[Tensor] = []

    def see(layer: Layer) -> None:
        names.append(layer.name)
        parts.append(layer.part)
        mass.append(layer.mass().masked_fill(~layer.real[:, None], math.nan).cpu())

    look(model, batch, see, name)
    return PrefixMass(tuple(names), tuple(parts), tuple(mass))
