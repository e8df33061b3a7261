"""Shifts the positions of decoders that take no position ids, by a hook on the module that embeds positions."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastprefix.errors import fail

_PAST = "past_key_values_length"


def find_table(owner: nn.Module) -> nn.Module | None:
    """The module inside a decoder that embeds positions; None unless there is exactly one."""
    found = [m for m in owner.modules() if m is not owner and _PAST in inspect.signature(m.forward).parameters]
    return found[0] if len(found) == 1 else None


def has_position_embeddings(owner: nn.Module) -> bool:
    """Whether a module inside has the name of an embedding of absolute positions."""
    names = ("embed_positions", "position_embeddings", "position_embedding", "wpe")
    return any(name.rsplit(".", 1)[-1] in names for name, _ in owner.named_modules())


class ShiftedTable:
    """A hook on a position embedding module that moves the running forward's rows by ``offset`` positions."""

    def __init__(self, module: nn.Module) -> None:
        self.offset: int | Tensor = 0  # or [B, 1]
        self.signature = inspect.signature(module.forward)
        self.handle = module.register_forward_hook(self.after, with_kwargs=True)

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
        """After the module's forward: replace its embeddings by those ``offset`` positions later."""
        if isinstance(self.offset, int):
            return self.look_up(module, args, kwargs, self.offset) if self.offset else None
        rows = self.offset.flatten().tolist()
        found = {n: self.look_up(module, args, kwargs, n) for n in set(rows)}  # [S, d] or [B or 1, S, d]
        each = {n: (x if x.dim() == 3 else x[None]).expand(len(rows), -1, -1) for n, x in found.items()}
        return torch.stack([each[n][i] for i, n in enumerate(rows)])

    def look_up(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], offset: int) -> Tensor:
        """Call the module's forward again with its positions increased by ``offset``."""
        asked = self.signature.bind(*args, **kwargs).arguments
        if asked.get("position_ids") is not None:
            asked["position_ids"] = asked["position_ids"] + offset
        else:
            asked[_PAST] = asked.get(_PAST, 0) + offset
        forward: Callable[..., Tensor] = module.forward
        try:
            return forward(**asked)
        except IndexError as error:
            got = f"tokens behind a prefix that moves them by {offset}"
            expected = "fewer: the model has no position for the last ones (position_offset='none' moves nothing)"
            raise fail("decoder_input_ids", got, expected) from error
