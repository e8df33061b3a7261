"""Keys and values of prompts, kept with a generation's cache: a generation computes its prompt once."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any
from weakref import WeakKeyDictionary

import torch


class PromptKVCache:
    """Values by name for each cache object, for as long as it lives.

    Nothing is kept without a cache, under gradients or in a compiled graph.
    """

    def __init__(self) -> None:
        self.kept: WeakKeyDictionary[Any, dict[Hashable, tuple[Any, Any]]] = WeakKeyDictionary()

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.kept = WeakKeyDictionary()

    def get(self, kwargs: dict[str, Any], name: Hashable, version: Any) -> Any:
        """The value kept for a forward that continues its cache, if it is of this version; None otherwise."""
        cache = kwargs.get("past_key_values")
        if cache is None or torch.compiler.is_compiling() or torch.is_grad_enabled() or cache.get_seq_length() == 0:
            return None
        kept, value = self.kept.get(cache, {}).get(name, (None, None))
        return value if kept == version else None

    def put(self, kwargs: dict[str, Any], name: Hashable, version: Any, value: Any) -> None:
        """Keep a value with the forward's cache."""
        cache = kwargs.get("past_key_values")
        if cache is not None and not torch.compiler.is_compiling() and not torch.is_grad_enabled():
            self.kept.setdefault(cache, {})[name] = (version, value)
