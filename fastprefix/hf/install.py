"""``attach``, ``detach``, ``set_prefix``: a prefix in a transformers model, and the model as it was afterwards."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fastprefix.hf import probe
from fastprefix.hf.attention import SLOT
from fastprefix.hf.build import build
from fastprefix.hf.configs import OwnConfigs
from fastprefix.hf.hooks import ForwardHooks
from fastprefix.prefixes.config import PrefixConfig
from fastprefix.prefixes.prefix import LayerSlot, Prefix
from fastprefix.validation import fail

_STATE = "_fastprefix"
_ENCODERS = "fastprefix_encoders"


class Installation:
    """Everything fastprefix put into one model, and what it needs to take it out again."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.prefixes: dict[str, Prefix] = {}
        self.active: str | None = None
        self.trainable = [(p, p.requires_grad) for p in model.parameters()]
        self.configs = OwnConfigs(model)
        try:
            self.configs.switch(on=True)
            self.layers = probe.find_layers(model)
            self.check_masks()
        except BaseException:
            self.configs.restore()
            raise
        for module in self.layers.modules:
            module.add_module(SLOT, LayerSlot())
        self.hooks = ForwardHooks(self)

    def check_masks(self) -> None:
        """Some models merge masks with their own: what ours leave to the layer's causality would be lost on them."""
        owner = self.layers.owner
        ours = probe.sees_the_future(owner)
        self.configs.switch(on=False)
        before = probe.sees_the_future(owner)
        self.configs.switch(on=True)
        if ours != before:
            raise probe.does_not_dispatch(self.model, ": it makes masks of its own")

    @property
    def slots(self) -> list[LayerSlot]:
        """One per attention layer, in order."""
        slots = [getattr(module, SLOT) for module in self.layers.modules]
        assert all(isinstance(slot, LayerSlot) for slot in slots)
        return slots

    def place(self, name: str, prefix: Prefix) -> None:
        """Make a prefix's modules children of the model."""
        slots = self.slots
        for layer, index in zip(prefix.layers, prefix.layer_indices, strict=True):
            slots[index].prefixes[name] = layer
        for module, slot in zip(self.layers.modules, slots, strict=True):
            slot.train(module.training)
        encoders = self.layers.owner._modules.get(_ENCODERS)
        if prefix.encoder is not None:
            if encoders is None:
                encoders = nn.ModuleDict()
                self.layers.owner.add_module(_ENCODERS, encoders)
            assert isinstance(encoders, nn.ModuleDict)
            encoders[name] = prefix.encoder
        elif isinstance(encoders, nn.ModuleDict) and name in encoders:
            del encoders[name]
            if not encoders:
                del self.layers.owner._modules[_ENCODERS]

    def named(self, name: str) -> Prefix:
        """The prefix of a name; raises ValueError when none is attached under it."""
        if name not in self.prefixes:
            raise fail("name", repr(name), f"one of {sorted(self.prefixes)}")
        return self.prefixes[name]

    def activate(self, name: str | None) -> None:
        """Use one prefix, or none: then the model runs exactly what it ran before."""
        if name is not None and name not in self.prefixes:
            raise fail("name", repr(name), f"None or one of {sorted(self.prefixes)}")
        self.active = name
        for slot in self.slots:
            slot.active = name
        self.configs.switch(on=name is not None)

    @contextmanager
    def using(self, name: str | None) -> Iterator[None]:
        """Run with one prefix, or none, whichever is active outside."""
        outside = self.active
        if outside == name:
            yield
            return
        self.activate(name)
        try:
            yield
        finally:
            self.activate(outside)

    def remove(self) -> None:
        """Undo everything."""
        self.hooks.remove()
        for module in self.layers.modules:
            del module._modules[SLOT]
        self.layers.owner._modules.pop(_ENCODERS, None)
        self.configs.restore()
        for parameter, requires_grad in self.trainable:
            parameter.requires_grad_(requires_grad)


def installation(model: Any) -> Installation:
    """What is attached to a model; raises ValueError when nothing is."""
    found = getattr(model, _STATE, None)
    if not isinstance(found, Installation):
        raise fail("model", f"{type(model).__name__} without a prefix", "a model that fastprefix.attach was called on")
    return found


@torch.inference_mode(False)
def attach(
    model: Any, config: PrefixConfig, name: str = "default", *, weights: Callable[[Prefix], None] | None = None
) -> Prefix:
    """Give every attention layer of a transformers model a trained prefix, and freeze the rest of the model.

    Args:
        model: a decoder or encoder whose attention goes through transformers' attention interface.
        config: what to train and where to start.
        name: of this prefix; several can be attached, the last one is active (see :func:`set_prefix`).
        weights: called on the new prefix before it is placed in the model, to fill it from elsewhere.

    Returns:
        The trainable :class:`Prefix`; its parameters are fp32, on their layers' devices.

    Raises:
        ValueError: the model cannot carry a prefix (its class is named), a name is taken or a config field is off.
    """
    if not isinstance(config, PrefixConfig):
        raise fail("config", type(config).__name__, "a fastprefix.PrefixConfig")
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w-]*", name) or hasattr(nn.ModuleDict, name):
        raise fail("name", repr(name), "letters, digits, '_' and '-'")
    fresh = getattr(model, _STATE, None) is None
    if fresh:
        probe.check_model(model)
        if any(SLOT in module._modules for module in model.modules()):
            raise fail("model", f"{type(model).__name__} around a model with a prefix", "the model it was attached to")
        object.__setattr__(model, _STATE, Installation(model))
    state = installation(model)
    try:
        if name in state.prefixes:
            raise fail("name", repr(name), f"a new one: {sorted(state.prefixes)} are attached")
        prefix = build(state, config)
        if weights is not None:
            weights(prefix)
    except BaseException:
        if fresh:
            detach(model)
        raise
    ours = {id(p) for other in state.prefixes.values() for p in other.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in ours:
            parameter.requires_grad_(False)
    state.prefixes[name] = prefix
    state.place(name, prefix)
    state.activate(name)
    return prefix


def detach(model: Any) -> None:
    """Take every prefix out; the model is bit for bit what it was, its parameters trainable where they were."""
    state = installation(model)
    state.remove()
    # A wrapper (a compiled model, a PeftModel) finds the state by delegation: it lies in the model itself.
    del state.model.__dict__[_STATE]


def bake(model: Any, name: str = "default") -> Prefix:
    """Replace a prefix's MLP by its output, for use: the same numbers without the MLP's cost. Nothing without an MLP.

    Returns:
        The same :class:`Prefix`, its keys and values now parameters of their own.

    Raises:
        ValueError: no prefix of this name is attached.
    """
    state = installation(model)
    prefix = state.named(name)
    if prefix.encoder is not None:
        with torch.no_grad():
            keys, values = zip(*prefix.key_values(), strict=True)
        prefix.set_direct(keys, values)
        state.place(name, prefix)
    return prefix


def set_prefix(model: Any, name: str | None) -> None:
    """Make an attached prefix the active one; None runs the bare model.

    Raises:
        ValueError: nothing is attached, or not under this name.
    """
    installation(model).activate(name)
