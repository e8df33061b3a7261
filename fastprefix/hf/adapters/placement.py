"""Makes a prefix's modules children of the model, so that optimizers, wrappers and checkpoints find them."""

from __future__ import annotations

from torch import nn

from fastprefix.hf.adapters.installation import Installation
from fastprefix.hf.adapters.modules_to_save import ENCODERS
from fastprefix.prefixes.prefix import Prefix
from fastprefix.prefixes.prompt import SoftPrompt


def place(installation: Installation, name: str, prefix: Prefix | SoftPrompt) -> None:
    """Make a prefix's layers children of the attention modules, and its MLP or encoder a child of the model."""
    slots = installation.slots
    if isinstance(prefix, Prefix):
        for layer, index in zip(prefix.layers, prefix.layer_indices, strict=True):
            slots[index].prefixes[name] = layer
    for module, slot in zip(installation.facts.layers.modules, slots, strict=True):
        slot.train(module.training)
    installation.parameters.remember(name, prefix)
    layers = installation.facts.layers
    soft = isinstance(prefix, SoftPrompt)
    encoder: nn.Module | None = prefix.table if isinstance(prefix, SoftPrompt) else prefix.encoder
    owner = (layers.prompted if soft else layers.main).owner
    if encoder is None:
        _remove_encoder(installation, name)
        return
    encoders = owner._modules.get(ENCODERS)
    if encoders is None:
        encoders = nn.ModuleDict()
        owner.add_module(ENCODERS, encoders)
    assert isinstance(encoders, nn.ModuleDict)
    encoders[name] = encoder.train(owner.training)


def _remove_encoder(installation: Installation, name: str) -> None:
    """Take a prefix's MLP, or a prompt's embeddings, out of the model; there may be none."""
    for stack in installation.facts.layers.stacks:
        encoders = stack.owner._modules.get(ENCODERS)
        if isinstance(encoders, nn.ModuleDict) and name in encoders:
            del encoders[name]
            if not encoders:
                del stack.owner._modules[ENCODERS]


def displace(installation: Installation, name: str) -> None:
    """Take one prefix out of the model."""
    del installation.selection.prefixes[name]
    installation.parameters.known.pop(name, None)
    for slot in installation.slots:
        if name in slot.prefixes:
            del slot.prefixes[name]
    _remove_encoder(installation, name)
