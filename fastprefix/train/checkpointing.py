"""Gradient checkpointing, under its name in this release of transformers."""

from __future__ import annotations

from typing import Any


def checkpoint_layers(model: Any) -> None:
    """Recompute layers in the backward pass, by whichever name this release of transformers has for it."""
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
