"""``attach``, ``detach``, ``bake`` and ``set_prefix``: put prefixes into a transformers model and take them out."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, overload

import torch
from torch import nn

from fastprefix.errors import fail
from fastprefix.hf.adapters import placement
from fastprefix.hf.adapters.build import build, distribute
from fastprefix.hf.adapters.installation import Installation
from fastprefix.hf.adapters.lookup import (
    find_installation,
    get_or_install,
    require_installation,
    require_not_patched,
    uninstall,
)
from fastprefix.hf.adapters.trial_forward import run_once
from fastprefix.hf.adapters.verify_calls import verify_calls
from fastprefix.hf.attention.recording import AttentionCall
from fastprefix.hf.model import dtensor, wrappers
from fastprefix.prefixes.prefix import LayerConfig, Prefix
from fastprefix.prefixes.prompt import PromptConfig, SoftPrompt


@overload
def attach(
    model: Any, config: LayerConfig, name: str = "default", *, weights: Callable[[Any], None] | None = None
) -> Prefix: ...


@overload
def attach(
    model: Any, config: PromptConfig, name: str = "default", *, weights: Callable[[Any], None] | None = None
) -> SoftPrompt: ...


def attach(
    model: Any,
    config: LayerConfig | PromptConfig,
    name: str = "default",
    *,
    weights: Callable[[Any], None] | None = None,
) -> Prefix | SoftPrompt:
    """Give a transformers model a trained prefix or soft prompt, and freeze the rest of the model.

    Args:
        model: a decoder, encoder or encoder-decoder whose attention goes through transformers' attention interface.
        config: what to train and where to start: a :class:`PrefixConfig` (keys and values in every attention
            layer), a :class:`PromptConfig` (input embeddings), a :class:`LlamaAdapterConfig` (gated prompts) or a
            :class:`PrefixMemoryConfig` (a matrix for each head).
        name: name of this prefix. Several can be attached; the last one is active (see :func:`set_prefix`).
        weights: called on the new prefix before it is placed in the model, to fill it from elsewhere.

    Returns:
        The trainable :class:`Prefix` or :class:`SoftPrompt`; its parameters are fp32, on their layers' devices.

    Raises:
        ValueError: the model cannot carry a prefix (its class is named) or is sharded already, the name is taken, or
            a config field does not fit.
    """
    if not isinstance(config, LayerConfig | PromptConfig):
        raise fail(
            "config",
            type(config).__name__,
            "a fastprefix.PrefixConfig, PromptConfig, LlamaAdapterConfig or PrefixMemoryConfig",
        )

    def make(installation: Installation) -> Prefix | SoftPrompt:
        prefix = build(installation, config)
        if weights is not None:
            weights(prefix)
        return prefix

    return attach_prefix(model, name, make)


@torch.inference_mode(False)
def attach_prefix(model: Any, name: str, make: Callable[[Installation], Prefix | SoftPrompt]) -> Prefix | SoftPrompt:
    """Attach the prefix that ``make`` returns to a model; after an error the model is as it was."""
    check_name(name)
    model = wrappers.unwrapped(model, but=wrappers.ADDING)
    fresh = find_installation(model) is None
    installation = get_or_install(model)
    with installation.lock.hold():
        prefix, calls = _attach_locked(model, installation, name, make, fresh)
        verify_calls(calls)
    return prefix


def _attach_locked(
    model: Any, installation: Installation, name: str, make: Callable[[Installation], Prefix | SoftPrompt], fresh: bool
) -> tuple[Prefix | SoftPrompt, list[AttentionCall]]:
    try:
        if installation.selection.chosen is not None:
            raise fail("name", f"{name!r} inside a block of prefix_batch", "the block's end first")
        if name in installation.selection.provider.names():
            raise fail("name", repr(name), f"a new one: {sorted(installation.selection.provider.names())} are attached")
        prefix = make(installation)
        distribute(installation, prefix)
    except BaseException:
        if fresh:
            detach(model)
        raise
    before = installation.selection.active
    installation.freeze()
    installation.selection.prefixes[name] = prefix
    placement.place(installation, name, prefix)
    installation.activate(name)
    try:
        calls = run_once(installation)
    except BaseException:
        if fresh:
            detach(model)
        else:
            placement.displace(installation, name)
            installation.activate(before)
        raise
    return prefix, calls


def check_name(name: object) -> None:
    """Raise ValueError unless ``name`` can be a prefix's name."""
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w-]*", name) or hasattr(nn.ModuleDict, name):
        raise fail("name", repr(name), "letters, digits, '_' and '-'")


def _attached(model: Any) -> Installation:
    """A model's Installation; raises ValueError where there is none, or the model is a patched PEFT model."""
    installation = require_installation(model)
    require_not_patched(installation)
    return installation


def detach(model: Any, name: str | None = None) -> None:
    """Take every prefix out, or one of them.

    Without a name the model is again bit for bit what it was, and parameters that were trainable are so again. With a
    name that prefix alone leaves the model: its parameters, and its copies of modules (``modules_to_save``), are no
    longer in ``model.parameters()``. If it was active, no prefix is, and the model runs bare until
    :func:`set_prefix`. Whatever else is attached computes what it did before, bit for bit. A prefix on disk
    (:func:`register`) is dropped from memory, and its name is free again; its files stay. Once no prefix is left, in
    the model or on disk, the model is what it was before the first.

    Args:
        model: a model with prefixes attached or registered.
        name: name of the prefix to take out; None for all of them, also those on disk.

    Raises:
        ValueError: nothing is attached, or none under this name; the model is a patched PEFT model (see
            :func:`unpatch`). With a name also: a block of :func:`prefix_batch` or :func:`shared_prompt` is open, or the
            model is sharded or in a wrapper that has collected the prefix's parameters (DistributedDataParallel).
    """
    if name is not None:
        model = wrappers.unwrapped(model, but=wrappers.REMOVING)
    installation = _attached(model)
    with installation.lock.hold():
        if name is None:
            uninstall(installation)
        else:
            _detach_named(installation, name)


def _detach_named(installation: Installation, name: str) -> None:
    """Take one prefix out; ValueError, and nothing is changed, where that cannot be done."""
    selection = installation.selection
    provider = require_not_patched(installation)
    if selection.chosen is not None or selection.shared is not None:
        block = "prefix_batch" if selection.chosen is not None else "shared_prompt"
        raise fail("name", f"{name!r} inside a block of {block}", "the block's end first")
    if name not in provider.names():
        raise fail("name", repr(name), f"None or one of {sorted(provider.names())}")
    dtensor.tensor_parallel_mesh(installation.model)
    if selection.active == name:
        installation.activate(None)
    if name in selection.prefixes:
        placement.displace(installation, name)
    elif provider.registry is not None:
        provider.registry.forget(name)
    if not provider.names():
        uninstall(installation)
        return
    installation.origins.forget(name)
    installation.modules.forget_unused(provider.in_memory())


def bake(model: Any, name: str = "default") -> Prefix | SoftPrompt:
    """Replace a prefix's MLP, or a soft prompt's encoder, by its output: the same numbers without the network's cost.

    Without a network this does nothing. An encoder's output is that without dropout.

    Returns:
        The same prefix; its keys and values, or the prompt's embeddings, are now parameters themselves.

    Raises:
        ValueError: no prefix of this name is attached, or the model is sharded.
    """
    model = wrappers.unwrapped(model, but=wrappers.ADDING)
    installation = _attached(model)
    prefix = installation.selection.named(name)
    dtensor.tensor_parallel_mesh(model)
    if isinstance(prefix, Prefix) and prefix.encoder is not None:
        with torch.no_grad():
            keys, values = zip(*prefix.key_values(), strict=True)
        prefix.set_direct(keys, values)
        distribute(installation, prefix)
        placement.place(installation, name, prefix)
    elif isinstance(prefix, SoftPrompt) and prefix.encoder is not None:
        prefix.set_direct(prefix.encoder.without_dropout())
        placement.place(installation, name, prefix)
    return prefix


def set_prefix(model: Any, name: str | None) -> None:
    """Make an attached or registered prefix the active one; None runs the bare model.

    The other prefixes take no part in forwards and training: they get no gradient, and an optimizer skips parameters
    whose ``grad`` is None, whatever its weight decay. A gradient from before the switch is applied by the next step
    unless ``zero_grad()`` clears it; zeros (``set_to_none=False``) count as a gradient. ``requires_grad`` of their
    parameters stays as it is, as :func:`prefix_batch` trains whichever it names, and a backward pass may still come of
    a forward before the switch. DistributedDataParallel waits for the gradients of all trainable parameters: freeze the
    others before it is made (``prefix.requires_grad_(False)``), or pass ``find_unused_parameters=True``.

    Args:
        model: a model with prefixes attached or registered.
        name: name of the prefix, or None.

    Raises:
        ValueError: no prefix is attached, or none under this name.
    """
    installation = _attached(model)
    if installation.selection.chosen is not None:
        raise fail("name", f"{name!r} inside a block of prefix_batch", "the block's end first: it chooses for its rows")
    with installation.lock.hold():
        installation.activate(name)
