"""Builds a LLaMA-Adapter for a model, and finds by running the model how its layers make keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from fastprefix.errors import fail
from fastprefix.hf.adapters.installation import Installation
from fastprefix.hf.attention.projections import KeyValueProjection, call_arguments
from fastprefix.hf.model import probing
from fastprefix.prefixes.llama_adapter import AdapterKV, LlamaAdapterConfig
from fastprefix.prefixes.prefix import Prefix


def fill(installation: Installation, prefix: Prefix) -> Prefix:
    """Give an empty prefix its prompts, at random, and gates at zero."""
    config = prefix.config
    assert isinstance(config, LlamaAdapterConfig)
    devices = [installation.facts.layers.devices[i] for i in prefix.layer_indices]
    layers = []
    found = find_projections(installation, prefix.layer_indices)
    for project, gate, device in zip(found, prefix.gates(devices), devices, strict=True):
        assert gate is not None
        prompt = torch.randn(config.num_virtual_tokens, project.width) * config.init.std
        layers.append(AdapterKV(prompt.to(device), project, gate))
    prefix.layers = nn.ModuleList(layers)
    return prefix


def find_projections(installation: Installation, indices: Sequence[int]) -> list[KeyValueProjection]:
    """Each of these layers' own way from hidden states to keys and values.

    Raises:
        ValueError: a layer has none that depends on a token's hidden state alone; the model's class is named.
    """
    layers, name = installation.facts.layers, type(installation.model).__name__
    expected = "a model whose every layer makes keys and values of its own hidden states alone"
    if len(layers.stacks) > 1 or layers.reuses_modules or layers.kv_sources != tuple(range(len(layers.modules))):
        if len(layers.stacks) > 1:
            why = "which is an encoder-decoder"
        else:
            why = "which runs one module as several layers" if layers.reuses_modules else "whose layers share keys"
        raise fail("model", f"{name}, {why}", expected)
    modules = [layers.modules[i] for i in indices]
    arguments: dict[int, dict[str, Any]] = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        arguments[id(module)] = call_arguments(module, args, kwargs)

    handles = [module.register_forward_pre_hook(note, with_kwargs=True) for module in modules]
    active = installation.selection.active
    installation.activate(None)
    installation.configs.switch(on=True)
    try:
        with installation.forward.bypass():
            calls = probing.run(layers.main.owner, layers.main.dummy_inputs(tokens=3))
        values = {id(call.module): call.tensors["v"][0] for call in calls}
        found = []
        for module in modules:
            if id(module) not in arguments:
                raise fail("model", f"{name}, whose attention runs past its module's forward", expected)
            try:
                project = KeyValueProjection(module, arguments[id(module)], installation.configs)
                with probing.evaluating(installation.model):
                    _check(project, arguments[id(module)][project.hidden][0], values[id(module)])
            except (AssertionError, AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
                got = f"{name}, whose {type(module).__name__} makes them otherwise ({error})"
                raise fail("model", got, expected) from error
            found.append(project)
    finally:
        for handle in handles:
            handle.remove()
        installation.activate(active)
    return found


def _check(project: KeyValueProjection, hidden: torch.Tensor, values: torch.Tensor) -> None:
    """Raise RuntimeError unless values are the layer's own, and keys depend neither on places nor on other tokens."""
    if not _equal(project(hidden)[1], values):
        raise RuntimeError("its values of a hidden state are not those of the layer")
    probe = torch.linspace(-1.0, 1.0, 3 * project.width, device=hidden.device).sin().view(3, -1).to(hidden.dtype)
    for x, y in zip(project(probe), project(probe.flip(0)), strict=True):
        if not _equal(x, y.flip(1)):
            raise RuntimeError("a token's keys or values depend on its place")
    for x, y in zip(project(probe), project(probe[:1]), strict=True):
        if not _equal(x[:, :1], y):
            raise RuntimeError("a token's keys or values depend on the others")


def _equal(x: torch.Tensor, y: torch.Tensor) -> bool:
    tiny = min(64 * torch.finfo(x.dtype).eps, 0.03) * float(y.abs().max())
    return x.shape == y.shape and bool(x.isfinite().all()) and torch.allclose(x, y, rtol=0.0, atol=tiny)
