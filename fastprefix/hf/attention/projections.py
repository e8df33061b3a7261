"""Keys and values that an attention module makes of hidden states, without positions, by running the module itself."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastprefix.hf.attention.config_copies import ConfigCopies
from fastprefix.hf.attention.function import SLOT
from fastprefix.prefixes.prefix import LayerSlot


class KeyValueProjection:
    """An attention module's own way from hidden states ``[P, d]`` to keys ``[H_kv, P, D]`` and values, per token.

    The module's forward runs on the hidden states up to its attention function, which hands over keys and values. So
    whatever makes them is the module's: separate or fused projections, norms of keys, adapters such as LoRA's. Rotary
    positions are those of an angle of zero, which turns nothing.

    Args:
        module: the attention module, whose :class:`LayerSlot` is in place.
        arguments: the arguments of one call of the module's forward, by name.
        configs: the model's, by which attention is switched to fastprefix's.

    Raises:
        TypeError: an argument has no value for other hidden states.
    """

    def __init__(self, module: nn.Module, arguments: Mapping[str, Any], configs: ConfigCopies) -> None:
        self.module, self.configs = module, configs
        states = (name for name, x in arguments.items() if isinstance(x, Tensor) and _is_states(x))
        self.hidden = next(states, "")
        if not self.hidden:
            raise TypeError("no argument of its attention holds hidden states [B, S, d]")
        self.width: int = arguments[self.hidden].shape[-1]  # d
        self.dtype: torch.dtype = arguments[self.hidden].dtype
        self.plain: dict[str, Any] = {}
        self.rotary: dict[str, list[tuple[tuple[int, ...], torch.dtype]]] = {}  # shapes, where P tokens stand for 0
        for name, x in arguments.items():
            if name == self.hidden:
                continue
            if _is_rotary(x):
                parts = x if isinstance(x, tuple | list) else [x]
                self.rotary[name] = [(_of_tokens(part), part.dtype) for part in parts]
            elif x is None or isinstance(x, bool | int | float | str):
                self.plain[name] = x
            elif name == "attention_mask":
                self.plain[name] = None
            elif not (isinstance(x, Tensor) and not x.is_floating_point() and not x.is_complex()):
                raise TypeError(f"its attention takes {name}, a {type(x).__name__}")
            # Positions as numbers are left out: a module that needs them has keys that depend on them.

    def __call__(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """``[H_kv, P, D]`` and ``[H_kv, P, D_v]`` of ``[P, d]``, with their gradients."""
        slot: Any = self.module._modules[SLOT]
        assert isinstance(slot, LayerSlot)
        dtype = self._dtype()
        tokens, device = hidden.shape[0], hidden.device
        rotary: dict[str, Any] = {}
        for name, parts in self.rotary.items():
            # cos 1 and sin 0, or the complex number 1.
            found = [
                torch.full([n or tokens for n in shape], float(i == 0), device=device).to(dtype if same else own)
                for i, (shape, own) in enumerate(parts)
                for same in [own == self.dtype]
            ]
            rotary[name] = tuple(found) if len(found) > 1 else found[0]
        slot.projecting = True
        try:
            with self.configs.switched_on():
                # Not as a call: hooks around the module are for its forwards, in one of which this may be.
                self.module.forward(**{self.hidden: hidden.to(dtype)[None]}, **self.plain, **rotary)
            assert slot.captured is not None
            k, v = slot.captured
        finally:
            slot.projecting, slot.captured = False, None
        return k[0], v[0]

    def _dtype(self) -> torch.dtype:
        """The dtype in which the module computes; a model may be moved to another."""
        own = (p for name, p in self.module.named_parameters() if not name.startswith(f"{SLOT}."))
        return next((p.dtype for p in own if p.is_floating_point()), self.dtype)


def _is_states(x: Tensor) -> bool:
    return x.dim() == 3 and x.is_floating_point()


def _is_rotary(x: Any) -> bool:
    """Whether an argument is rotary positions: a pair of cosines and sines, or complex numbers."""
    if isinstance(x, Tensor):
        return x.is_complex()
    if not isinstance(x, tuple | list) or len(x) != 2:
        return False
    return all(isinstance(part, Tensor) and part.is_floating_point() and part.dim() >= 2 for part in x)


def _of_tokens(x: Tensor) -> tuple[int, ...]:
    """The shape for one row; 0 stands for its number of tokens."""
    lead = () if x.dim() < 3 else (*x.shape[:-3], 1)
    return (*lead, 0, x.shape[-1])


def call_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call of a module, by name, those of its ``**kwargs`` among the others."""
    bound = inspect.signature(module.forward).bind(*args, **kwargs).arguments
    kinds = inspect.signature(module.forward).parameters
    found: dict[str, Any] = {}
    for name, x in bound.items():
        found.update(x if kinds[name].kind is inspect.Parameter.VAR_KEYWORD else {name: x})
    return found
