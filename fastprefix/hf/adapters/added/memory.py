"""Builds a prefix memory for a model."""

from __future__ import annotations

from torch import nn

from fastprefix.hf.adapters.installation import Installation
from fastprefix.prefixes.memory import MemoryLayer
from fastprefix.prefixes.prefix import Prefix


def fill(installation: Installation, prefix: Prefix) -> Prefix:
    """Give an empty prefix a memory of zeros in each of its layers."""
    devices = [installation.facts.layers.devices[i] for i in prefix.layer_indices]
    sizes = zip(prefix.num_heads, prefix.shapes, devices, strict=True)
    prefix.layers = nn.ModuleList(MemoryLayer(heads, shape, device) for heads, shape, device in sizes)
    return prefix
