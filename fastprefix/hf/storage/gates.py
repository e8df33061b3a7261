"""The gates of a prefix in adapter weights: ``layers.<i>.gate``, ``[H]``, or ``[1]`` for all heads of the layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from fastprefix.prefixes.gate import Gate
from fastprefix.prefixes.prefix import Prefix


def _named(prefix: Prefix) -> Iterator[tuple[str, Gate]]:
    for i, layer in zip(prefix.layer_indices, prefix.layers, strict=True):
        if isinstance(layer.gate, Gate):
            yield f"layers.{i}.gate", layer.gate


def tensors(prefix: Prefix) -> dict[str, Tensor]:
    """What is saved: the trained numbers, before tanh."""
    return {name: gate.weight.detach().cpu().contiguous() for name, gate in _named(prefix)}


def wanted(prefix: Prefix) -> dict[str, tuple[str, Sequence[int]]]:
    """Dims in words, and sizes, of the tensors that a prefix of this configuration is loaded from."""
    kind = prefix.config.gate
    if kind is None:
        return {}
    dims = "[1]" if kind == "scalar" else "[H]"
    layers = zip(prefix.layer_indices, prefix.num_heads, strict=True)
    return {f"layers.{i}.gate": (dims, [1 if kind == "scalar" else heads]) for i, heads in layers}


@torch.no_grad()
def fill(prefix: Prefix, saved: Mapping[str, Tensor]) -> None:
    """Copy saved numbers into a prefix's gates."""
    for name, gate in _named(prefix):
        gate.weight.copy_(saved[name])
