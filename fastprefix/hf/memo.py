"""What belongs to a cache: a generation computes its prompt once, for as long as its cache lives."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch


class Memo:
    """Values under keys, one for each cache; nothing without a cache, under gradients or in a compiled graph."""

    def __init__(self) -> None:
        self.kept: WeakKeyDictionary[Any, tuple[Any, Any]] = WeakKeyDictionary()

    def __deepcopy__(self, memo: dict[int, Any]) -> Memo:
        return Memo()

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.kept = WeakKeyDictionary()

    def recall(self, kwargs: dict[str, Any], key: Any) -> Any:
        """What was kept for a forward that continues its cache; None otherwise."""
        if torch.compiler.is_compiling():
            return None
        cache = kwargs.get("past_key_values")
        if cache is None or cache.get_seq_length() == 0:
            return None
        kept_key, value = self.kept.get(cache, (None, None))
        return value if kept_key == key else None

    def remember(self, kwargs: dict[str, Any], key: Any, value: Any) -> None:
        """Keep it with the forward's cache."""
        cache = kwargs.get("past_key_values")
        if cache is not None and not torch.compiler.is_compiling() and not torch.is_grad_enabled():
            self.kept[cache] = (key, value)
