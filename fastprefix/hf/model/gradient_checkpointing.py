"""Finds which of a model's modules use gradient checkpointing, and whether it is reentrant."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from torch import nn

FUNCTION = "_gradient_checkpointing_func"


def checkpointed_modules(model: nn.Module) -> list[Any]:
    """Modules that transformers can checkpoint; their attribute ``gradient_checkpointing`` says whether it does."""
    return [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]


def is_active(modules: Sequence[Any]) -> bool:
    """Whether some of these modules are recomputed in the backward pass."""
    return any(module.gradient_checkpointing and module.training for module in modules)


def is_reentrant(modules: Sequence[Any]) -> bool:
    """Whether some of these modules are checkpointed with ``use_reentrant=True``: each runs its own backward pass."""
    for module in modules:
        if module.gradient_checkpointing and module.training:
            function = getattr(module, FUNCTION, None)
            function = getattr(function, "original", function)  # unwrap fastprefix's wrapper
            keywords = function.keywords if isinstance(function, functools.partial) else {}
            return bool(keywords.get("use_reentrant", True))
    return False
