"""Finds a model's :class:`Installation`, creates it and removes it."""

from __future__ import annotations

from typing import Any

from fastprefix.errors import fail
from fastprefix.hf.adapters.attached_prefixes import AttachedPrefixes
from fastprefix.hf.adapters.installation import Installation
from fastprefix.hf.attention.function import SLOT
from fastprefix.hf.model import dtensor, probing, wrappers

ATTRIBUTE = "_fastprefix"


def find_installation(model: Any) -> Installation | None:
    """The Installation of a model, or of the model that it wraps; None where there is none."""
    found = getattr(wrappers.unwrapped(model), ATTRIBUTE, None)
    return found if isinstance(found, Installation) else None


def require_installation(model: Any) -> Installation:
    """The Installation of a model; raises ValueError where there is none."""
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
    """The Installation of a model, created if there is none.

    Raises:
        ValueError: the model is a patched PEFT model, or it is sharded otherwise than by tensor parallelism, so that
            each device would get another prefix.
    """
    model = wrappers.unwrapped(model)
    dtensor.tensor_parallel_mesh(model)
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
    """Remove an Installation from its model."""
    installation.remove()
    # The attribute is the model's own; a wrapper (a compiled model, a PeftModel) only finds it by delegation.
    del installation.model.__dict__[ATTRIBUTE]
