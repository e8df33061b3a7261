"""Modules around the one that owns the layers: some make masks and positions for it (Gemma 3, PaliGemma).

The owner of a stack is the innermost module around all its layers that takes the main input.
"""

from __future__ import annotations

import inspect
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastprefix.hf.attention import masks
from fastprefix.hf.attention.config_copies import ConfigCopies
from fastprefix.hf.model import probing
from fastprefix.hf.model.layers import AttentionStack

_MASK = "attention_mask"


@dataclass(frozen=True)
class OuterModules:
    """The arguments that outer modules make for a stack's owner, in a forward of text alone."""

    makes_masks: bool = False  # whether the owner receives finished masks where the caller passed ``[B, S]`` padding
    makes_positions: bool = False  # whether it receives ``[B, S]`` positions where the caller passed none
    first_position: int = 0  # position of a row's first token (PaliGemma counts from 1)


def find_outer_modules(model: nn.Module, stack: AttentionStack) -> OuterModules:
    """Run a model on a few tokens, with a mask and without one, and record the arguments of the stack's owner."""
    if stack.owner is model or stack.extra_inputs or stack.main_input != "input_ids":
        return OuterModules()  # the decoder of an encoder-decoder makes its own
    given: list[dict[str, Any]] = []

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given.append({**dict(zip(stack.owner_arguments, args, strict=False)), **kwargs})

    inputs = stack.dummy_inputs(tokens=3)
    mask = torch.tensor([[1, 1, 0]], device=inputs["input_ids"].device)  # a mask of ones might be dropped
    handle = stack.owner.register_forward_pre_hook(record, with_kwargs=True)
    try:
        probing.run(model, inputs)
        if _MASK in inspect.signature(model.forward).parameters:
            with suppress(AttributeError, LookupError, RuntimeError, TypeError, ValueError):  # the model's own
                probing.run(model, {**inputs, _MASK: mask})
    finally:
        handle.remove()
    positions = [kwargs["position_ids"] for kwargs in given if isinstance(kwargs.get("position_ids"), Tensor)]
    return OuterModules(
        makes_masks=any(_is_made(kwargs.get(_MASK)) for kwargs in given),
        makes_positions=any(ids.dim() == 2 for ids in positions),
        first_position=int(positions[0].min()) if positions else 0,
    )


def _is_made(mask: Any) -> bool:
    return isinstance(mask, dict) or (isinstance(mask, Tensor) and mask.dim() == 4)


class _Given(NamedTuple):
    """The arguments with which an outer module was called."""

    mask: Tensor | None  # [B, S]
    made_masks: bool  # whether finished masks were passed instead
    position_ids: Tensor | None


class OuterCall:
    """Hooks on the modules around a stack's owner, which remember the masks and positions that the caller passed.

    There are no hooks where the owner makes masks and positions itself.
    """

    def __init__(self, model: nn.Module, stack: AttentionStack, outer: OuterModules, configs: ConfigCopies) -> None:
        self.outer, self.causal, self.configs = outer, stack.causal, configs
        self.given: dict[int, _Given] = {}  # by id of each running module, the outermost first
        self.handles: list[Any] = []
        if not outer.makes_masks and not outer.makes_positions:
            return
        for module in model.modules():
            arguments = tuple(inspect.signature(module.forward).parameters)
            if module is not stack.owner and _MASK in arguments and _holds(module, stack.owner):
                enter = _Enter(self, arguments)
                self.handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
                self.handles.append(module.register_forward_hook(self.leave, always_call=True))

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """After a module's forward: forget its arguments."""
        self.given.pop(id(module), None)

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self.handles:
            handle.remove()

    @property
    def first_position(self) -> int:
        """Position of a row's first token in the running forward."""
        return self.outer.first_position if self.given else 0

    @property
    def makes_masks(self) -> bool:
        """Whether an outer module made the running forward's masks (with our mask function), not the caller."""
        given = list(self.given.values())
        return bool(given) and not given[0].made_masks

    def own_arguments(self, kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """The mask and position ids of a call of the owner, or those passed to the outer module that replaced them."""
        mask, ids = kwargs.get(_MASK), kwargs.get("position_ids")
        if not self.given:
            return mask, ids
        given = list(self.given.values())
        if _is_made(mask):
            mask = given[-1].mask
        if self.outer.makes_positions and isinstance(ids, Tensor) and ids.dim() == 2 and given[0].position_ids is None:
            ids = None
        return mask, ids


class _Enter:
    """A hook before an outer module's forward, which remembers its arguments."""

    def __init__(self, call: OuterCall, arguments: tuple[str, ...]) -> None:
        self.call, self.arguments = call, arguments

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = {**dict(zip(self.arguments, args, strict=False)), **kwargs}
        mask = given.get(_MASK)
        padding = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
        masks.requested.explicit_causal = not self.call.causal
        masks.requested.even_without_padding = self.call.configs.ran_eager
        self.call.given[id(module)] = _Given(padding, _is_made(mask), given.get("position_ids"))


def _holds(module: nn.Module, inner: nn.Module) -> bool:
    return any(child is inner for child in module.modules())
