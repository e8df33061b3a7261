"""Where a model's installation is found, put in and taken out."""

from __future__ import annotations

from typing import Any

from fastprefix.hf.adapters.installation import Installation
from fastprefix.hf.attention.function import SLOT
from fastprefix.hf.model import layers as probe
from fastprefix.hf.model import wrappers
from fastprefix.validation import fail

STATE = "_fastprefix"


def found(model: Any) -> Installation | None:
    """What is in a model, or in the one it wraps."""
    state = getattr(wrappers.unwrapped(model), STATE, None)
    return state if isinstance(state, Installation) else None


def installation(model: Any) -> Installation:
    """What is attached to a model; raises ValueError when nothing is."""
    state = found(model)
    if state is None:
        expected = "a model that fastprefix.attach or fastprefix.patch was called on"
        raise fail("model", f"{type(model).__name__} without a prefix", f"{expected}{wrappers.hint(model)}")
    state.home.bring_back(state.model)
    return state


def install(model: Any) -> Installation:
    """Put slots and hooks into a bare model; raises ValueError when it cannot carry a prefix."""
    probe.check_model(model)
    if any(SLOT in module._modules for module in model.modules()):
        raise fail("model", f"{type(model).__name__} around a model with a prefix", "the model it was attached to")
    state = Installation(model)
    object.__setattr__(model, STATE, state)
    return state


def uninstall(state: Installation) -> None:
    """Take everything out of the model."""
    state.remove()
    # A wrapper (a compiled model, a PeftModel) finds the state by delegation: it lies in the model itself.
    del state.model.__dict__[STATE]
