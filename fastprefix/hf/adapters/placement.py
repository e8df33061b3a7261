"""Where an attached prefix's modules lie: children of the model, so that whatever walks it finds their parameters."""

from __future__ import annotations

from torch import nn

from fastprefix.hf.adapters.installation import Installation
from fastprefix.hf.adapters.modules_to_save import ENCODERS
from fastprefix.prefixes.prefix import Prefix
from fastprefix.prefixes.prompt import SoftPrompt


def place(state: Installation, name: str, prefix: Prefix | SoftPrompt) -> None:
    """Make a prefix's modules children of the model."""
    slots = state.slots
    if isinstance(prefix, Prefix):
        for layer, index in zip(prefix.layers, prefix.layer_indices, strict=True):
            slots[index].prefixes[name] = layer
    for module, slot in zip(state.facts.layers.modules, slots, strict=True):
        slot.train(module.training)
    state.parameters.remember(name, prefix)
    encoder = prefix.table if isinstance(prefix, SoftPrompt) else prefix.encoder
    encoders = state.facts.layers.main.owner._modules.get(ENCODERS)
    if encoder is not None:
        if encoders is None:
            encoders = nn.ModuleDict()
            state.facts.layers.main.owner.add_module(ENCODERS, encoders)
        assert isinstance(encoders, nn.ModuleDict)
        encoders[name] = encoder
    elif isinstance(encoders, nn.ModuleDict) and name in encoders:
        del encoders[name]
        if not encoders:
            del state.facts.layers.main.owner._modules[ENCODERS]


def displace(state: Installation, name: str) -> None:
    """Take one prefix out again."""
    del state.selection.prefixes[name]
    for slot in state.slots:
        if name in slot.prefixes:
            del slot.prefixes[name]
    encoders = state.facts.layers.main.owner._modules.get(ENCODERS)
    if isinstance(encoders, nn.ModuleDict) and name in encoders:
        del encoders[name]
        if not encoders:
            del state.facts.layers.main.owner._modules[ENCODERS]
