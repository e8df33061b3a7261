"""Continuous batching runs in a thread of its own, where errors end in a log: it is refused at its entry."""

from __future__ import annotations

from typing import Any

from fastprefix.errors import fail
from fastprefix.hf.attention.config_copies import ConfigCopies
from fastprefix.hf.runtime.selection import Selection

_ENTRY = "init_continuous_batching"  # what generate_batch, the context manager and a server go through


class ContinuousBatching:
    """Takes the place of a model's entry to continuous batching."""

    def __init__(self, model: Any, selection: Selection, configs: ConfigCopies) -> None:
        self.model, self.selection, self.configs = model, selection, configs
        if hasattr(type(model), _ENTRY):
            model.__dict__[_ENTRY] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own, while it runs bare; raises ValueError while a prefix is read."""
        if self.selection.shared is not None or self.selection.current() is not None:
            got = f"{type(self.model).__name__} with a prefix, in continuous batching (generate_batch)"
            expected = "no active prefix there, as its paged cache cannot run beside one: use generate, or detach"
            raise fail("model", got, expected)
        self.configs.switch(on=False)  # it asks for the attention's name before the first forward
        return getattr(type(self.model), _ENTRY)(self.model, *args, **kwargs)

    def remove(self) -> None:
        """Give the model its own back."""
        self.model.__dict__.pop(_ENTRY, None)
