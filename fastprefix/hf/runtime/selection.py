"""Which of a model's prefixes the next forward reads: the active one, or those that a block selects for its rows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from fastprefix.errors import fail
from fastprefix.hf.runtime.forward_context import AdapterSelection, ForwardContext, PrefixProvider
from fastprefix.prefixes.kv import PartEncoders, PrefixEncoder
from fastprefix.prefixes.prefix import Prefix
from fastprefix.prefixes.prompt import Place, SoftPrompt


class PromptBlock(Protocol):
    """An open block of :func:`fastprefix.shared_prompt`."""

    number: int

    def predict(self, next_logits: Tensor) -> None:
        """Keep ``[B, V]``, the prompt's prediction of each row's first token."""
        ...

    def read(self, selection: AdapterSelection | None, kwargs: dict[str, Any]) -> ForwardContext:
        """The context of a forward inside the block."""
        ...


class Selection:
    """The prefixes attached to one model, and which of them the next forward reads."""

    provider: PrefixProvider

    def __init__(self) -> None:
        self.prefixes: dict[str, Prefix | SoftPrompt] = {}
        self.active: str | None = None
        self.chosen: AdapterSelection | None = None  # set by a block that names a prefix for each row
        self.shared: PromptBlock | None = None  # set by a shared_prompt block

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the model made inside a block is outside of that block.
        return {**self.__dict__, "chosen": None, "shared": None}

    @contextmanager
    def choosing(self, selected: AdapterSelection) -> Iterator[None]:
        """Let the rows of forwards inside the block read these names."""
        outside, self.chosen = self.chosen, selected
        try:
            with self.provider.held(selected):
                yield
        finally:
            self.chosen = outside

    @contextmanager
    def sharing(self, block: PromptBlock) -> Iterator[None]:
        """Let forwards inside the block read a shared prompt."""
        outside, self.shared = self.shared, block
        try:
            yield
        finally:
            self.shared = outside

    def named(self, name: str) -> Prefix | SoftPrompt:
        """The prefix attached under a name; raises ValueError where there is none."""
        if name not in self.prefixes:
            raise fail("name", repr(name), f"one of {sorted(self.prefixes)}")
        return self.prefixes[name]

    def current(self) -> AdapterSelection | None:
        """The names that the next forward's rows read; None for the bare model."""
        if self.chosen is None:
            return self.provider.active()
        return self.chosen if self.provider.enabled() else None

    def active_encoder(self) -> PrefixEncoder | PartEncoders | None:
        """The MLP of the active prefix, if it has one."""
        prefix = self.prefixes.get(self.active) if self.active is not None else None
        return prefix.encoder if isinstance(prefix, Prefix) else None

    def added(self) -> str | None:
        """The kind of a prefix of the next forward whose output is added to the content's; None without one."""
        selection = self.current()
        found = [] if selection is None else [self.provider.resolve(name) for name in selection.distinct()]
        return next((prefix.kind for prefix in found if prefix.added), None)

    def has_prompts(self) -> bool:
        """Whether a row of the next forward has a soft or shared prompt in front of it."""
        selection = self.current()
        if self.shared is not None or selection is None:
            return self.shared is not None
        return any(self.provider.resolve(name).prompt is not None for name in selection.distinct())

    def inner_place(self) -> Place | None:
        """The place of a soft prompt that stands inside a row of the next forward; None where none does."""
        selection = self.current()
        places = () if selection is None else (self.provider.resolve(name).place for name in selection.distinct())
        return next((place for place in places if place != "before"), None)

    def prompted_rows(self, batch: int) -> Tensor | None:
        """``[B]`` bool, the rows that have a soft or shared prompt in front; None where all have."""
        selection = self.current()
        if self.shared is not None or selection is None:
            return None
        has_prompt = {name: self.provider.resolve(name).prompt is not None for name in selection.distinct()}
        found = [name is not None and has_prompt[name] for name in selection.rows(batch)]
        return None if all(found) else torch.tensor(found)

    def padding_behind_prompts(self, mask: Tensor) -> Tensor:
        """``[B]``, hidden places before each row's first token in a mask ``[B, T]``; 0 for a row without a prompt."""
        padding, prompted = (mask.cumsum(1) == 0).sum(1), self.prompted_rows(len(mask))
        return padding if prompted is None else padding * prompted.to(mask.device)
