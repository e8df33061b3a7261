"""``slot_mass`` and ``slot_geometry``: what each token of a prefix, a slot, is read for, and how slots differ."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastprefix.analysis.forward import Layer, look, named_prefix
from fastprefix.analysis.result import Result, figure, heat_map, plain
from fastprefix.errors import fail
from fastprefix.prefixes import slots as numbers
from fastprefix.types import MASKED_BIAS

_SCORES = 2**22  # numbers of a matrix of scores that is held at a time
DEAD = 1e-4  # largest share of attention of a slot that counts as unread


@dataclass(frozen=True)
class SlotMass(Result):
    """The attention that each slot gets, over all rows that are not padding, on the CPU.

    Attributes:
        layers: names of the attention modules that read the prefix, in execution order.
        parts: each one's part of an encoder-decoder, else None.
        mean: ``[H, P]`` of each layer, the mean share of attention.
        peak: ``[H, P]`` of each layer, the largest of any row.
    """

    layers: tuple[str, ...]
    parts: tuple[str | None, ...]
    mean: tuple[Tensor, ...]
    peak: tuple[Tensor, ...]

    def by_slot(self) -> Tensor:
        """``[L, P]``, the mean over heads."""
        return torch.stack([x.mean(0) for x in self.mean])

    def dead(self, threshold: float = DEAD) -> tuple[tuple[int, int], ...]:
        """Pairs (place in ``layers``, slot) of a slot with less than ``threshold`` of any row's attention."""
        peaks = torch.stack([x.amax(0) for x in self.peak])  # [L, P]
        return tuple((i, j) for i, j in (peaks < threshold).nonzero().tolist())

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain data, with ``by_slot`` and ``dead``."""
        return {**super().to_dict(), "by_slot": plain(self.by_slot()), "dead": plain(self.dead())}

    def plot(self) -> Any:
        """Layers by slots."""
        made = figure(0.12 * self.mean[0].shape[1] + 4.8, 0.16 * len(self.layers) + 2.4)
        axes = made.subplots()
        heat_map(axes, self.by_slot(), vmin=0.0)
        axes.set(title="mean mass of a slot", xlabel="slot", ylabel="layer")
        return made


def slot_mass(model: Any, batch: Mapping[str, Any], name: str | None = None) -> SlotMass:
    """The attention that each token of a prefix gets in each layer and head: slots that no row reads are dead.

    Scores of the prefix are computed some rows at a time, and the softmax's denominator is the operator's log-sum-exp
    over prefix and content, so that no attention matrix is held.

    Args:
        model: with a prefix attached (or a patched PEFT model). It runs in eval mode, without gradients.
        batch: the keyword arguments of the model's forward; see :func:`prefix_mass`.
        name: of the prefix; None for the active one.

    Raises:
        ValueError: as :func:`prefix_mass`, or rows read different prefixes, whose slots are not each other's.
    """
    rows: list[tuple[Any, ...]] = []
    look(model, batch, lambda layer: rows.append(_of_layer(layer)), name)
    return SlotMass(*(tuple(column) for column in zip(*rows, strict=True)))


def _of_layer(layer: Layer) -> tuple[Any, ...]:
    if "prefix_ids" in layer.options:
        raise fail("name", "prefixes of a row's own", "one prefix for all rows: another's slots are not these")
    q, keys = layer.tensors["q"], layer.tensors["prefix_k"]  # [B, H, S, D], [H_kv, P, D]
    lse = layer.whole()[1]
    heads, groups = q.shape[1], q.shape[1] // keys.shape[0]
    rows, shift = (x.transpose(1, 2)[layer.real].transpose(0, 1) for x in (q, lse[..., None]))  # [H, n, D], [H, n, 1]
    keys = keys.to(rows.dtype)
    total = shift.new_zeros(heads, keys.shape[1], dtype=torch.float64)
    peak = shift.new_zeros(heads, keys.shape[1])
    for some, norm in zip(
        *(x.split(max(1, _SCORES // (heads * keys.shape[1])), 1) for x in (rows, shift)), strict=True
    ):
        scores = some.unflatten(0, (-1, groups)).to(norm.dtype) @ keys.to(norm.dtype).mT[:, None]  # [H_kv, G, c, P]
        weights = (_finished(scores, layer.options, q.shape[3]).flatten(0, 1) - norm).exp()
        total += weights.sum(1)
        peak = torch.maximum(peak, weights.amax(1))
    return layer.name, layer.part, (total / rows.shape[1]).to(peak.dtype).cpu(), peak.cpu()


def _finished(products: Tensor, options: Mapping[str, Any], dim: int) -> Tensor:
    """Scores ``[H_kv, G, c, P]`` of products of queries and prefix keys: scaled, capped, with the prefix's bias."""
    scale, cap, bias = (options.get(name) for name in ("scale", "softcap", "prefix_bias"))
    scores = products * (dim**-0.5 if scale is None else scale)
    if cap is not None:
        scores = cap * torch.tanh(scores / cap)
    if bias is not None:
        bias = bias.to(scores.dtype)[:, None, None]
        scores = torch.where(bias > MASKED_BIAS, scores + bias, -torch.inf)
    return scores


@dataclass(frozen=True)
class SlotGeometry(Result):
    """How different a prefix's slots are from each other.

    Attributes:
        layers: indices of the attention layers with the prefix; (None,) of a soft prompt, whose slots are embeddings.
        mean_cosine: ``[L]``, the mean cosine of all pairs of slots; nan with a single slot.
        effective_rank: ``[L]``, the exponential of the entropy of the singular values, from 1 to P (Roy & Vetterli
            2007); 0 where all numbers are 0.
        tied: pairs of slots that are equal in every layer.
    """

    layers: tuple[int | None, ...]
    mean_cosine: Tensor
    effective_rank: Tensor
    tied: tuple[tuple[int, int], ...]

    def collapsed(self, threshold: float = numbers.COLLAPSED) -> tuple[int | None, ...]:
        """The layers in which the slots' mean cosine is at least ``threshold``: they point in one direction."""
        return tuple(i for i, cosine in zip(self.layers, self.mean_cosine.tolist(), strict=True) if cosine >= threshold)

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain data, with ``collapsed``."""
        return {**super().to_dict(), "collapsed": plain(self.collapsed())}

    def plot(self) -> Any:
        """Mean cosine and effective rank by layer."""
        made = figure(8.0, 3.2)
        cosine, rank = made.subplots(1, 2)
        places = range(len(self.layers))
        cosine.plot(places, self.mean_cosine.tolist(), "o-", markersize=3)
        cosine.set(
            title="mean pairwise cosine", xlabel="layer", ylim=(min(0.0, *self.mean_cosine.tolist()) - 0.05, 1.05)
        )
        rank.plot(places, self.effective_rank.tolist(), "o-", markersize=3)
        rank.set(title="effective rank", xlabel="layer", ylim=(0.0, None))
        return made


def slot_geometry(model: Any, name: str | None = None) -> SlotGeometry:
    """How different the slots of an attached prefix or soft prompt are: collapsed and tied ones do the work of one.

    A slot is the vector of a token's keys and values in a layer, of all its heads, or a soft prompt's embedding after
    its encoder. No batch is needed.

    Args:
        model: with the prefix attached.
        name: of the prefix; None for the active one.

    Raises:
        ValueError: the model has no such prefix, or is a patched PEFT model.
    """
    _, _, prefix = named_prefix(model, name)
    layers = numbers.slots(prefix)
    cosines = torch.tensor([numbers.mean_cosine(x.vectors) for x in layers], dtype=torch.float64)
    ranks = torch.tensor([numbers.effective_rank(x.vectors) for x in layers], dtype=torch.float64)
    pairs = tuple(numbers.tied_everywhere(layers))
    return SlotGeometry(tuple(x.layer for x in layers), cosines, ranks, pairs)
