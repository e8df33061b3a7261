"""Gradient checkpointing around a prefix: recomputed with the prefix of the forward, in both modes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastprefix.hf.attention.function import SLOT, masks
from fastprefix.hf.runtime.prefix_reader import Reading
from fastprefix.prefixes.prefix import LayerKV
from fastprefix.validation import fail

if TYPE_CHECKING:
    from fastprefix.hf.adapters.installation import Installation

_FUNCTION = "_gradient_checkpointing_func"


class _Recompute:
    """A checkpointing function whose recomputation reads what the forward read."""

    def __init__(self, state: Installation, original: Callable[..., Any]) -> None:
        self.state, self.original = state, original

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        reading, active, modules = self.state.running, self.state.active, self.state.modules.using
        if reading is not None:
            args = self.state.checkpointing.enter(reading, args)

        def run(*inputs: Any, **options: Any) -> Any:
            state = self.state
            with state.turns.turn(), state.checkpointing.again(reading, active), state.modules.in_place(modules):
                return function(*inputs, **options)

        return self.original(run, *args, **kwargs)


class Bridge(torch.autograd.Function):
    """The way of gradients around reentrant checkpointing, which runs a backward of its own for every layer.

    The layers read leaves in place of what the prompt's own graph gave, and collect gradients there. This function
    stands in front of the first layer, so its backward runs after all of theirs: it hands over what they collected.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, leaves: list[Tensor], *originals: Tensor) -> Tensor:
        ctx.leaves = leaves
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        collected = [leaf.grad for leaf in ctx.leaves]
        for leaf in ctx.leaves:
            leaf.grad = None
        return (grad if ctx.needs_input_grad[0] else None, None, *collected)


class Checkpointing:
    """The checkpointed layers of one model."""

    def __init__(self, state: Installation) -> None:
        self.state = state
        self.modules = [m for m in state.model.modules() if hasattr(m, "gradient_checkpointing")]

    def active(self) -> bool:
        """Whether layers are recomputed in the backward pass."""
        return any(m.gradient_checkpointing and m.training for m in self.modules)

    def reentrant(self) -> bool:
        """Whether they are, by a backward pass of their own inside the backward pass."""
        for module in self.modules:
            if module.gradient_checkpointing and module.training:
                function = getattr(module, _FUNCTION, None)
                function = function.original if isinstance(function, _Recompute) else function
                keywords = function.keywords if isinstance(function, functools.partial) else {}
                return bool(keywords.get("use_reentrant", True))
        return False

    def remember_reading(self) -> None:
        """Have every layer recomputed with what its forward reads."""
        for module in self.modules:
            function = getattr(module, _FUNCTION, None)
            if function is not None and not isinstance(function, _Recompute):
                setattr(module, _FUNCTION, _Recompute(self.state, function))

    @contextmanager
    def again(self, reading: Reading | None, active: str | None) -> Iterator[None]:
        """Run a part of a forward again with what it read (None: the bare model), whatever is chosen by now."""
        if any(SLOT not in module._modules for module in self.state.layers.modules):
            raise RuntimeError("fastprefix: the prefix was taken out between a checkpointed forward and its backward")
        slots, on, beside = self.state.slots, self.state.configs.on, masks.running.beside
        offset, self.state.query_scales.offset = self.state.query_scales.offset, reading.offset if reading else 0
        outside = [(slot.active, slot.given, slot.overridden) for slot in slots]
        self.state.switch(on=reading is not None)
        masks.running.beside = slots[0].beside if reading is not None and reading.beside else None
        for slot, kv in zip(slots, (reading and reading.layers) or [None] * len(slots), strict=True):
            slot.active, slot.given = active, kv
            slot.overridden = reading is None or reading.layers is not None
        try:
            yield
        finally:
            for slot, (name, kv, overridden) in zip(slots, outside, strict=True):
                slot.active, slot.given, slot.overridden = name, kv, overridden
            self.state.switch(on=on)
            masks.running.beside = beside
            self.state.query_scales.offset = offset

    def remove(self) -> None:
        """Give the layers their own checkpointing functions back."""
        for module in self.modules:
            function = getattr(module, _FUNCTION, None)
            if isinstance(function, _Recompute):
                setattr(module, _FUNCTION, function.original)

    def leave(self, reading: Reading) -> Reading:
        """The reading with leaves in place of what has a graph, where reentrant checkpointing would run it twice."""
        if reading.layers is None or not reading.tensors() or not torch.is_grad_enabled() or not self.reentrant():
            return reading
        leaves: dict[int, tuple[Tensor, Tensor]] = {}

        def leaf(x: Tensor | None) -> Tensor | None:
            if x is None or not x.requires_grad:
                return x
            return leaves.setdefault(id(x), (x.detach().requires_grad_(), x))[0]

        layers = [kv if kv is None else LayerKV(*map(leaf, kv)) for kv in reading.layers]  # type: ignore[arg-type]
        return replace(reading, layers=layers, leaves=list(leaves.values()))

    def enter(self, reading: Reading, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """A layer's inputs, the first asking for a gradient: reentrant checkpointing drops the prefix's otherwise."""
        if not torch.is_grad_enabled() or not self.reentrant():
            return args
        if not args:
            raise fail("use_reentrant", True, "False: this model's layers have no input to return gradients through")
        if self.state.layers.sources != tuple(range(len(self.state.layers.modules))):
            expected = "False: layers of this model read another's keys and values, whose gradients would be lost"
            raise fail("use_reentrant", True, expected)
        hidden, *rest = args  # [B, S, d], ...
        if reading.leaves:
            leaves, originals = zip(*reading.leaves, strict=True)
            reading.leaves = []
            hidden = Bridge.apply(hidden, list(leaves), *originals)
        return (hidden if hidden.requires_grad else hidden.detach().requires_grad_(), *rest)
