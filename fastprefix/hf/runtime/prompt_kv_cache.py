"""Keeps the keys and values of prompts with a generation's cache object, so that a generation computes them once."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any
from weakref import WeakKeyDictionary

import torch


class PromptKVCache:
    """Stores values by name for each cache object, for as long as the cache object lives.

    Nothing is stored for a forward without a cache, with gradients, or in a compiled graph.
    """

    def __init__(self) -> None:
        self.kept: WeakKeyDictionary[Any, dict[Hashable, tuple[Any, Any]]] = WeakKeyDictionary()

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.kept = WeakKeyDictionary()

    def get(self, kwargs: dict[str, Any], name: Hashable, version: Any) -> Any:
        """The value stored for the forward's non-empty cache under this name and version; None without one."""
        cache = kwargs.get("past_key_values")
        if cache is None or torch.compiler.is_compiling() or torch.is_grad_enabled() or cache.get_seq_length() == 0:
            return None
        kept, value = self.kept.get(cache, {}).get(name, (None, None))
        return value if kept == version else None

    def put(self, kwargs: dict[str, Any], name: Hashable, version: Any, value: Any) -> None:
        """Store a value with the forward's cache."""
        cache = kwargs.get("past_key_values")
        if cache is not None and not torch.compiler.is_compiling() and not torch.is_grad_enabled():
            self.kept.setdefault(cache, {})[name] = (version, value)
