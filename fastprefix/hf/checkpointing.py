"""Gradient checkpointing around a prefix: recomputed with the prefix of the forward, in both modes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fastprefix.hf.install import Installation

_FUNCTION = "_gradient_checkpointing_func"


class _Recompute:
    """A checkpointing function whose recomputation sees the prefix that was active in the forward."""

    def __init__(self, state: Installation, original: Callable[..., Any]) -> None:
        self.state, self.original = state, original

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.original(function, *args, **kwargs)
        active = self.state.active

        def run(*inputs: Any, **options: Any) -> Any:
            with self.state.using(active):
                return function(*inputs, **options)

        return self.original(run, *args, **kwargs)


class Checkpointing:
    """The checkpointed layers of one model."""

    def __init__(self, state: Installation) -> None:
        self.state = state
        self.modules = [m for m in state.model.modules() if hasattr(m, "gradient_checkpointing")]

    def active(self) -> bool:
        """Whether layers are recomputed in the backward pass."""
        return any(m.gradient_checkpointing and m.training for m in self.modules)

    def remember_prefix(self) -> None:
        """Have every layer recomputed with the prefix that its forward runs with."""
        for module in self.modules:
            function = getattr(module, _FUNCTION, None)
            if function is not None and not isinstance(function, _Recompute):
                setattr(module, _FUNCTION, _Recompute(self.state, function))

    def remove(self) -> None:
        """Give the layers their own checkpointing functions back."""
        for module in self.modules:
            function = getattr(module, _FUNCTION, None)
            if isinstance(function, _Recompute):
                setattr(module, _FUNCTION, function.original)

    def needs_input_gradient(self, hidden: Tensor) -> bool:
        """Whether reentrant checkpointing would otherwise drop the prefix's gradient."""
        if hidden.requires_grad or not torch.is_grad_enabled():
            return False
        for module in self.modules:
            if module.gradient_checkpointing and module.training:
                function = getattr(module, _FUNCTION, None)
                function = function.original if isinstance(function, _Recompute) else function
                keywords = function.keywords if isinstance(function, functools.partial) else {}
                return bool(keywords.get("use_reentrant", True))
        return False
