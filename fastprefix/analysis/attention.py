"""``relative_attention``: whether a prefix re-aims attention among the content's tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastprefix.analysis.forward import Layer, checked, look, run_bare, share
from fastprefix.analysis.result import Result, figure, heat_map, stacked
from fastprefix.functional import to_args
from fastprefix.masks import additive_bias, visible_keys
from fastprefix.types import lse_dtype

_SCORES = 2**22  # numbers of a matrix of scores that is held at a time


@dataclass(frozen=True)
class RelativeAttention(Result):
    """Attention among content tokens with and without the prefix, over all rows that are not padding, on the CPU.

    Attributes:
        layers: names of the attention modules that read the prefix, in execution order.
        parts: each one's part of an encoder-decoder, else None.
        error: ``[H]`` of each layer, the largest ``|A_ij - (1 - m_i) C_ij|``: the content's weights ``A`` next to the
            prefix against those ``C`` of the content alone, for the same queries and keys. The theorem says 0.
        shift: ``[H]`` of each layer, the mean over rows of the total variation distance, from 0 to 1, between
            ``A_ij / sum_j A_ij`` and these weights in the model without the prefix, whose queries and keys are others.
            It is 0 in the lowest layer, unless positions are absolute or begin elsewhere.
    """

    layers: tuple[str, ...]
    parts: tuple[str | None, ...]
    error: tuple[Tensor, ...]
    shift: tuple[Tensor, ...]

    def plot(self) -> Any:
        """The distance to the model without the prefix, by layer and head."""
        made = figure(5.6, 0.16 * len(self.layers) + 2.4)
        axes = made.subplots()
        heat_map(axes, stacked(self.shift), vmin=0.0, vmax=1.0)
        axes.set(title="attention among content, moved by", xlabel="head", ylabel="layer")
        return made


def relative_attention(model: Any, batch: Mapping[str, Any], name: str | None = None) -> RelativeAttention:
    """Compare attention among content tokens with a prefix and without (Petrov et al. 2024, 2310.19698).

    In one layer a prefix scales all content weights of a row by ``1 - m``, and their ratios stay (``error``). Layers
    above read other inputs, so that their attention may move (``shift``). Weights are computed some rows at a time. The
    queries and keys of all layers are held between two forwards, with the prefix and without.

    Args:
        model: with a prefix attached (or a patched PEFT model). It runs in eval mode, without gradients.
        batch: the keyword arguments of the model's forward; see :func:`prefix_mass`.
        name: of the prefix; None for the active one.

    Raises:
        ValueError: as :func:`prefix_mass`.
    """
    seen: list[tuple[Layer, Tensor]] = []
    look(model, batch, lambda layer: seen.append((_without_values(layer), _error(layer))), name)
    waiting, shifts = [layer for layer, _ in seen], list[Tensor]()

    def see(layer: Layer) -> None:
        if waiting and waiting[0].name == layer.name:
            shifts.append(_distance(waiting.pop(0), layer))

    run_bare(checked(model, batch), batch, see)
    names, parts = zip(*((layer.name, layer.part) for layer, _ in seen), strict=True)
    return RelativeAttention(names, parts, tuple(error for _, error in seen), tuple(shifts))


def _without_values(layer: Layer) -> Layer:
    """What the second comparison needs of a layer."""
    return replace(layer, tensors={name: layer.tensors[name] for name in ("q", "k")})


def _chunks(layer: Layer) -> Iterator[tuple[slice, Tensor]]:
    """Some rows at a time: their places in ``S``, and scores ``[B, H, c, T]`` of the content, -inf where hidden."""
    q, k = layer.tensors["q"], layer.tensors["k"]
    B, H, S, D = q.shape
    T = k.shape[2]
    start = layer.options.get("q_start")
    kept = {name: x for name, x in layer.options.items() if not name.startswith("prefix_") and name != "q_start"}
    nothing = k.new_empty(k.shape[1], 0, D)
    step = max(1, _SCORES // (B * H * T))
    for first in range(0, S, step):
        rows = slice(first, min(first + step, S))
        bias = kept.get("bias")
        own = {} if bias is None or bias.dim() < 2 or bias.shape[-2] == 1 else {"bias": bias[..., rows, :]}
        begin = (T - S if start is None else start) + first
        args = to_args(q[:, :, rows], k, k, nothing, nothing, **{**kept, **own}, q_start=begin)
        dtype = lse_dtype(q.dtype)
        grouped = args.q.to(dtype).unflatten(1, (k.shape[1], -1))  # [B, H_kv, G, c, D]
        scores = (grouped @ args.k.to(dtype).mT[:, :, None]).flatten(1, 2) * args.scale
        if args.softcap is not None:
            scores = args.softcap * torch.tanh(scores / args.softcap)
        added, visible = additive_bias(args), visible_keys(args)
        if added is not None:
            scores = scores + added.to(dtype)
        yield rows, scores if visible is None else scores.masked_fill(~visible, -torch.inf)


def _error(layer: Layer) -> Tensor:
    """``[H]``, the largest difference of a content weight from ``1 - m`` times that of the content alone."""
    whole, content, prefix = layer.whole()[1], layer.of_content()[1], layer.of_prefix()[1]
    left = 1.0 - share(prefix, content)
    found = left.new_zeros(left.shape[1])
    for rows, scores in _chunks(layer):
        joint, alone = ((scores - _finite(lse[:, :, rows, None])).exp_() for lse in (whole, content))
        error = (joint - left[:, :, rows, None] * alone).abs().amax(3)  # [B, H, c]
        found = torch.maximum(found, error.masked_fill(~layer.real[:, None, rows], 0.0).amax((0, 2)))
    return found.cpu()


def _distance(with_prefix: Layer, without: Layer) -> Tensor:
    """``[H]``, the mean total variation distance of two layers' attention among content."""
    total = torch.zeros(with_prefix.tensors["q"].shape[1], dtype=torch.float64, device=with_prefix.real.device)
    for (rows, one), (_, other) in zip(_chunks(with_prefix), _chunks(without), strict=True):
        distance = (_softmax(one) - _softmax(other)).abs().sum(3) / 2.0  # [B, H, c]
        total += distance.masked_fill(~with_prefix.real[:, None, rows], 0.0).sum((0, 2)).double()
    return (total / with_prefix.real.sum()).cpu()


def _softmax(scores: Tensor) -> Tensor:
    """A row that sees nothing has weights of 0."""
    return (scores - _finite(scores.logsumexp(3, keepdim=True))).exp_()


def _finite(lse: Tensor) -> Tensor:
    return lse.masked_fill(torch.isneginf(lse), 0.0)
