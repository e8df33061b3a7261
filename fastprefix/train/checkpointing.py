"""Turn on gradient checkpointing in any supported release of transformers."""

from __future__ import annotations

from typing import Any


def checkpoint_layers(model: Any) -> None:
    """Turn on gradient checkpointing of the layers, under the name that this release of transformers has for it."""
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
