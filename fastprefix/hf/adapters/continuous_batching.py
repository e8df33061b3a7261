"""Refuses continuous batching while a prefix is read, at its entry: errors in its own thread would only be logged.

``fastprefix.serving.continuous_batching`` puts an entry of its own in place of this one, with which it works.
"""

from __future__ import annotations

from typing import Any

from fastprefix.errors import fail
from fastprefix.hf.attention.config_copies import ConfigCopies
from fastprefix.hf.runtime.selection import Selection

_ENTRY = "init_continuous_batching"  # generate_batch, the context manager and the server all call this method


class ContinuousBatching:
    """Replaces the method of a model that starts continuous batching."""

    def __init__(self, model: Any, selection: Selection, configs: ConfigCopies) -> None:
        self.model, self.selection, self.configs = model, selection, configs
        if hasattr(type(model), _ENTRY):
            model.__dict__[_ENTRY] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model's own method; raises ValueError while a prefix is read."""
        if self.selection.shared is not None or self.selection.current() is not None:
            got = f"{type(self.model).__name__} with a prefix, in continuous batching (generate_batch)"
            enable = "fastprefix.serving.continuous_batching.enable_continuous_batching"
            expected = f"{enable}(model) before it, or no active prefix"
            raise fail("model", got, expected)
        self.configs.switch(on=False)  # the method reads the attention implementation before the first forward
        return getattr(type(self.model), _ENTRY)(self.model, *args, **kwargs)

    def remove(self) -> None:
        """Restore the model's own method."""
        self.model.__dict__.pop(_ENTRY, None)
