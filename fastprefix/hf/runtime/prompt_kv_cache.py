"""What belongs to a cache: a generation computes its prompt once, for as long as its cache lives."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any
from weakref import WeakKeyDictionary

import torch


class Memo:
    """Values by name, for each cache; nothing without a cache, under gradients or in a compiled graph."""

    def __init__(self) -> None:
        self.kept: WeakKeyDictionary[Any, dict[Hashable, tuple[Any, Any]]] = WeakKeyDictionary()

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.kept = WeakKeyDictionary()

    def recall(self, kwargs: dict[str, Any], name: Hashable, stamp: Any) -> Any:
        """What was kept for a forward that continues its cache, if it was kept under this stamp; None otherwise."""
        cache = kwargs.get("past_key_values")
        if cache is None or torch.compiler.is_compiling() or torch.is_grad_enabled() or cache.get_seq_length() == 0:
            return None
        kept, value = self.kept.get(cache, {}).get(name, (None, None))
        return value if kept == stamp else None

    def remember(self, kwargs: dict[str, Any], name: Hashable, stamp: Any, value: Any) -> None:
        """Keep it with the forward's cache."""
        cache = kwargs.get("past_key_values")
        if cache is not None and not torch.compiler.is_compiling() and not torch.is_grad_enabled():
            self.kept.setdefault(cache, {})[name] = (stamp, value)
