"""``bias_decomposition``: the prefix as a bias of each layer's attention, ``o = (1 - m) o_c + m o_p``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastprefix.analysis.forward import Layer, look
from fastprefix.analysis.result import Result, figure, heat_map, plain, stacked


@dataclass(frozen=True)
class BiasDecomposition(Result):
    """What a prefix adds to the output of each layer's attention, over all rows that are not padding.

    One entry for each layer that reads a prefix, in execution order, on the CPU in fp64.

    Attributes:
        layers: names of the attention modules.
        parts: each one's part of an encoder-decoder, else None.
        error: ``[H]``, the largest ``|o - ((1 - m) o_c + m o_p)|`` of any number of the output.
        output: ``[H]``, the root mean square norm of a row of ``o``.
        bias: ``[H]``, that of a row of ``m o_p``.
        singular_values: ``[H, min(n, D_v)]`` of the biases of all n rows, descending.
        direction: ``[H, D_v]``, the unit vector along which the biases are largest. The mean bias points along it.
    """

    layers: tuple[str, ...]
    parts: tuple[str | None, ...]
    error: tuple[Tensor, ...]
    output: tuple[Tensor, ...]
    bias: tuple[Tensor, ...]
    singular_values: tuple[Tensor, ...]
    direction: tuple[Tensor, ...]

    def explained(self) -> tuple[Tensor, ...]:
        """``[H]`` of each layer, the share of the biases' squares along ``direction``; 1 along one vector alone."""
        return tuple(_share(s) for s in self.singular_values)

    def rank(self, tolerance: float = 1e-6) -> tuple[Tensor, ...]:
        """``[H]`` int64 of each layer: singular values above ``tolerance`` times the largest; at most P."""
        return tuple((s > tolerance * s[:, :1]).sum(1) for s in self.singular_values)

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain data, with ``explained`` and ``rank``."""
        return {**super().to_dict(), "explained": plain(self.explained()), "rank": plain(self.rank())}

    def plot(self) -> Any:
        """The size of the bias next to the output's, and how much of it is along one direction, by layer and head."""
        made = figure(9.6, 0.16 * len(self.layers) + 2.4)
        size, along = made.subplots(1, 2)
        heat_map(size, stacked(tuple(b / o for b, o in zip(self.bias, self.output, strict=True))), vmin=0.0)
        size.set(title="norm of the bias / of the output", xlabel="head", ylabel="layer")
        heat_map(along, stacked(self.explained()), vmin=0.0, vmax=1.0)
        along.set(title="share along one direction", xlabel="head", ylabel="layer")
        return made


def bias_decomposition(model: Any, batch: Mapping[str, Any], name: str | None = None) -> BiasDecomposition:
    """What a prefix adds to each layer's attention, and how exactly the decomposition holds.

    Attention over prefix and content is ``o = (1 - m) o_c + m o_p`` (Petrov et al. 2024, 2310.19698), with
    the prefix's mass ``m``, and the outputs ``o_c`` over the content and ``o_p`` over the prefix alone. ``m o_p`` is
    the bias; all rows' biases of a head span at most P dimensions. The three outputs are computed by the operator on
    the layer's own queries, keys and values, so that ``error`` is one of rounding.

    Args:
        model: with a prefix attached (or a patched PEFT model). It runs in eval mode, without gradients.
        batch: the keyword arguments of the model's forward; see :func:`prefix_mass`.
        name: of the prefix; None for the active one.

    Raises:
        ValueError: as :func:`prefix_mass`.
    """
    rows: list[tuple[Any, ...]] = []
    look(model, batch, lambda layer: rows.append(_of_layer(layer)), name)
    return BiasDecomposition(*(tuple(column) for column in zip(*rows, strict=True)))


def _of_layer(layer: Layer) -> tuple[Any, ...]:
    o, _ = layer.whole()
    o_p, _ = layer.of_prefix()
    o_c, _ = layer.of_content()
    m = layer.mass()[..., None]
    # [H, n, D_v], in fp64 from here on, so that the sums add no error of their own.
    whole, prefix, content, mass = (_rows(x, layer.real) for x in (o, o_p, o_c, m.expand_as(o[..., :1])))
    bias = mass * prefix
    error = (whole - ((1.0 - mass) * content + bias)).abs().amax((1, 2))
    # The triangle of a QR decomposition has the singular values of all rows.
    triangle = torch.linalg.qr(bias, mode="r").R
    _, values, right = torch.linalg.svd(triangle, full_matrices=False)
    direction = right[:, 0]
    along = torch.einsum("hd,hd->h", bias.mean(1), direction)
    direction = torch.where(along[:, None] < 0.0, -direction, direction)
    found = (error, _norm(whole), _norm(bias), values, direction)
    return layer.name, layer.part, *(x.cpu() for x in found)


def _rows(x: Tensor, real: Tensor) -> Tensor:
    """``[B, H, S, X] -> [H, n, X]`` in fp64, the n rows that are not padding."""
    return x.transpose(1, 2)[real].transpose(0, 1).double()


def _norm(x: Tensor) -> Tensor:
    return x.square().sum(2).mean(1).sqrt()


def _share(values: Tensor) -> Tensor:
    squares = values.square()
    return squares[:, 0] / squares.sum(1).clamp(min=torch.finfo(squares.dtype).tiny)
