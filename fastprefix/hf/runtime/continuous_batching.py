"""Continuous batching runs in a thread of its own, where errors end in a log: it is refused at its entry."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastprefix.validation import fail

if TYPE_CHECKING:
    from fastprefix.hf.adapters.installation import Installation

_ENTRY = "init_continuous_batching"  # what generate_batch, the context manager and a server go through


class ContinuousBatching:
    """Takes the place of a model's entry to continuous batching."""

    def __init__(self, state: Installation) -> None:
        self.state = state
        if hasattr(type(state.model), _ENTRY):
            state.model.__dict__[_ENTRY] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own, while it runs bare; raises ValueError while a prefix is read."""
        state = self.state
        if state.shared is not None or state.choice() is not None:
            got = f"{type(state.model).__name__} with a prefix, in continuous batching (generate_batch)"
            expected = "no active prefix there, as its paged cache cannot run beside one: use generate, or detach"
            raise fail("model", got, expected)
        state.switch(on=False)  # it asks for the attention's name before the first forward
        return getattr(type(state.model), _ENTRY)(state.model, *args, **kwargs)

    def remove(self) -> None:
        """Give the model its own back."""
        self.state.model.__dict__.pop(_ENTRY, None)
