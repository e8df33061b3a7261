"""Finds a model's installation, puts one in and takes it out."""

from __future__ import annotations

from typing import Any

from fastprefix.errors import fail
from fastprefix.hf.adapters.attached_prefixes import AttachedPrefixes
from fastprefix.hf.adapters.installation import Installation
from fastprefix.hf.attention.function import SLOT
from fastprefix.hf.model import dtensor, probing, wrappers

ATTRIBUTE = "_fastprefix"


def find_installation(model: Any) -> Installation | None:
    """What is installed in a model, or in the one it wraps; None where nothing is."""
    found = getattr(wrappers.unwrapped(model), ATTRIBUTE, None)
    return found if isinstance(found, Installation) else None


def require_installation(model: Any) -> Installation:
    """What is installed in a model; raises ValueError when nothing is."""
    installation = find_installation(model)
    if installation is None:
        expected = "a model that fastprefix.attach or fastprefix.patch was called on"
        raise fail("model", f"{type(model).__name__} without a prefix", f"{expected}{wrappers.hint(model)}")
    installation.parameters.bring_back(installation.model)
    return installation


def require_not_patched(installation: Installation) -> AttachedPrefixes:
    """The provider of attached prefixes; raises ValueError for a patched PEFT model, whose adapters are PEFT's."""
    provider = installation.selection.provider
    if not isinstance(provider, AttachedPrefixes):
        expected = "an attached one: a patched model's adapters are PEFT's to add, choose, save and delete"
        raise fail("model", f"a patched {type(installation.model).__name__}", expected)
    return provider


def get_or_install(model: Any) -> Installation:
    """What is installed in a model, or now is.

    Raises:
        ValueError: a patched PEFT model, or one that is sharded, where a prefix would differ from device to device.
    """
    model = wrappers.unwrapped(model)
    dtensor.refuse(model)
    installation = find_installation(model)
    if installation is None:
        return install(model)
    require_not_patched(installation)
    return installation


def install(model: Any) -> Installation:
    """Put slots and hooks into a bare model; raises ValueError when it cannot carry a prefix."""
    probing.check_model(model)
    if any(SLOT in module._modules for module in model.modules()):
        raise fail("model", f"{type(model).__name__} around a model with a prefix", "the model it was attached to")
    installation = Installation(model)
    object.__setattr__(model, ATTRIBUTE, installation)
    return installation


def uninstall(installation: Installation) -> None:
    """Take everything out of the model."""
    installation.remove()
    # A wrapper (a compiled model, a PeftModel) finds the attribute by delegation: it is the model's own.
    del installation.model.__dict__[ATTRIBUTE]
