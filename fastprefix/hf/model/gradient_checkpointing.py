"""Which of a model's modules are checkpointed, and whether by reentrant checkpointing."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from torch import nn

FUNCTION = "_gradient_checkpointing_func"


def checkpointed_modules(model: nn.Module) -> list[Any]:
    """Modules that transformers can checkpoint; ``gradient_checkpointing`` tells whether it does."""
    return [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]


def is_active(modules: Sequence[Any]) -> bool:
    """Whether some of these modules are recomputed in the backward pass."""
    return any(module.gradient_checkpointing and module.training for module in modules)


def is_reentrant(modules: Sequence[Any]) -> bool:
    """Whether they are recomputed by a backward pass of their own inside the backward pass (``use_reentrant=True``)."""
    for module in modules:
        if module.gradient_checkpointing and module.training:
            function = getattr(module, FUNCTION, None)
            function = getattr(function, "original", function)  # of a function that fastprefix has wrapped
            keywords = function.keywords if isinstance(function, functools.partial) else {}
            return bool(keywords.get("use_reentrant", True))
    return False
