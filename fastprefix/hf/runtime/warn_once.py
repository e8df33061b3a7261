"""Warnings that are shown once per model, however many forwards would cause them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager


class WarnOnce:
    """Warns, and remembers by key which warnings were shown already."""

    def __init__(self) -> None:
        self.given: set[str] = set()

    def __call__(self, key: str, message: str, stacklevel: int = 3) -> None:
        """Warn, unless a warning with this key was shown before."""
        if key not in self.given:
            self.given.add(key)
            warnings.warn(message, stacklevel=stacklevel)

    @contextmanager
    def forgotten(self) -> Iterator[None]:
        """After the block, forget the warnings shown inside it, so that they are shown again."""
        before = set(self.given)
        try:
            yield
        finally:
            self.given = before

    def concatenation(self, reason: str) -> None:
        """Warn that a prompt is concatenated to every row, with the reason."""
        self(reason, f"fastprefix: the prompt is concatenated to every row, not shared: {reason}", stacklevel=3)
