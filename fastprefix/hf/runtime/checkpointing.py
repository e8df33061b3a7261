"""Gradient checkpointing: a layer is recomputed with the prefix of its forward, in both modes (reentrant or not)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fastprefix.errors import fail
from fastprefix.hf.attention import masks
from fastprefix.hf.attention.config_copies import ConfigCopies
from fastprefix.hf.attention.query_scaling import QueryScaling
from fastprefix.hf.model import gradient_checkpointing
from fastprefix.hf.model.facts import ModelFacts
from fastprefix.hf.runtime.forward_context import ForwardContext, ForwardState
from fastprefix.hf.runtime.forward_lock import ForwardLock
from fastprefix.hf.runtime.selection import Selection
from fastprefix.hf.runtime.slots import AttentionSlots
from fastprefix.prefixes.prefix import LayerKV

_FUNCTION = gradient_checkpointing.FUNCTION
_TAKEN_OUT = "fastprefix: the prefix was taken out between a checkpointed forward and its backward"


class SwappedModules(Protocol):
    """Replaces modules of the model by a prefix's trained copies (``modules_to_save``)."""

    using: dict[str, nn.Module]

    def in_place(self, chosen: Mapping[str, nn.Module]) -> AbstractContextManager[None]:
        """Put these copies into the model, by path, for the duration of the block."""
        ...


class _Recompute:
    """A layer's checkpointing function, whose recomputation reads the same context as the forward."""

    def __init__(self, checkpointing: Checkpointing, original: Callable[..., Any]) -> None:
        self.checkpointing, self.original = checkpointing, original

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        checkpointing = self.checkpointing
        context, active = checkpointing.forward.context, checkpointing.selection.active
        modules = checkpointing.swapped.using
        if context is not None:
            args = checkpointing.require_gradient(context, args)

        def run(*inputs: Any, **options: Any) -> Any:
            swapped = checkpointing.swapped.in_place(modules)
            with checkpointing.lock.hold(), checkpointing.recomputing(context, active), swapped:
                return function(*inputs, **options)

        return self.original(run, *args, **kwargs)


class Bridge(torch.autograd.Function):
    """Carries gradients to a prompt's graph under reentrant checkpointing, which runs one backward pass per layer.

    The layers read detached leaves instead of the prompt's keys and values, and accumulate gradients in them. This
    function is applied before the first layer, so its backward runs last and passes the leaves' gradients on.
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
    """Gradient checkpointing of one model: wraps the layers' checkpointing functions."""

    def __init__(
        self,
        facts: ModelFacts,
        configs: ConfigCopies,
        slots: AttentionSlots,
        selection: Selection,
        forward: ForwardState,
        lock: ForwardLock,
        query_scaling: QueryScaling,
        swapped: SwappedModules,
    ) -> None:
        self.facts, self.configs, self.slots, self.selection = facts, configs, slots, selection
        self.forward, self.lock, self.query_scaling, self.swapped = forward, lock, query_scaling, swapped
        self.modules = gradient_checkpointing.checkpointed_modules(facts.model)

    def active(self) -> bool:
        """Whether layers are recomputed in the backward pass."""
        return gradient_checkpointing.is_active(self.modules)

    def wrap_functions(self) -> None:
        """Wrap every layer's checkpointing function, so that recomputation reads the forward's context."""
        for module in self.modules:
            function = getattr(module, _FUNCTION, None)
            if function is not None and not isinstance(function, _Recompute):
                setattr(module, _FUNCTION, _Recompute(self, function))

    @contextmanager
    def recomputing(self, context: ForwardContext | None, active: str | None) -> Iterator[None]:
        """Restore a forward's context (None: the bare model) inside the block, whichever prefix is active now."""
        if not self.slots.present():
            raise RuntimeError(_TAKEN_OUT)
        in_slots = context is not None and context.layers is None
        if in_slots and active not in self.selection.prefixes:
            raise RuntimeError(_TAKEN_OUT)
        slots, on, implementation = list(self.slots), self.configs.on, masks.requested.implementation
        offset, self.query_scaling.offset = self.query_scaling.offset, context.offset if context else 0
        outside = [(slot.active, slot.override, slot.is_overridden, slot.packed) for slot in slots]
        self.configs.switch(on=context is not None)
        gated = context is not None and context.gated
        masks.requested.implementation = slots[0].fallback_attention if gated else None
        for slot, kv in zip(slots, (context and context.layers) or [None] * len(slots), strict=True):
            slot.active, slot.override, slot.packed = active, kv, context.packed if context else None
            slot.is_overridden = context is None or context.layers is not None
        try:
            yield
        finally:
            for slot, (name, kv, is_overridden, packed) in zip(slots, outside, strict=True):
                slot.active, slot.override, slot.is_overridden, slot.packed = name, kv, is_overridden, packed
            self.configs.switch(on=on)
            masks.requested.implementation = implementation
            self.query_scaling.offset = offset

    def remove(self) -> None:
        """Restore the layers' own checkpointing functions."""
        for module in self.modules:
            function = getattr(module, _FUNCTION, None)
            if isinstance(function, _Recompute):
                setattr(module, _FUNCTION, function.original)

    def detach_prompt(self, context: ForwardContext) -> ForwardContext:
        """Replace tensors with a graph by leaves, where reentrant checkpointing would run that graph twice."""
        if context.layers is None or not torch.is_grad_enabled() or not context.tensors():
            return context
        if not gradient_checkpointing.is_reentrant(self.modules):
            return context
        leaves: dict[int, tuple[Tensor, Tensor]] = {}

        def leaf(x: Tensor | None) -> Tensor | None:
            if x is None or not x.requires_grad:
                return x
            return leaves.setdefault(id(x), (x.detach().requires_grad_(), x))[0]

        layers = [kv if kv is None else LayerKV(*map(leaf, kv)) for kv in context.layers]  # type: ignore[arg-type]
        return replace(context, layers=layers, leaves=list(leaves.values()))

    def require_gradient(self, context: ForwardContext, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Set ``requires_grad`` on a layer's first input, without which reentrant checkpointing drops gradients."""
        if not torch.is_grad_enabled() or not gradient_checkpointing.is_reentrant(self.modules):
            return args
        if not args:
            raise fail("use_reentrant", True, "False: this model's layers have no input to return gradients through")
        layers = self.facts.layers
        if layers.kv_sources != tuple(range(len(layers.modules))):
            expected = "False: layers of this model read another's keys and values, whose gradients would be lost"
            raise fail("use_reentrant", True, expected)
        hidden, *rest = args  # [B, S, d], ...
        if context.leaves:
            leaves, originals = zip(*context.leaves, strict=True)
            context.leaves = []
            hidden = Bridge.apply(hidden, list(leaves), *originals)
        return (hidden if hidden.requires_grad else hidden.detach().requires_grad_(), *rest)
