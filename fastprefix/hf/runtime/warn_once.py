"""Warnings that a model's user is given once, however many forwards have a reason for them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager


class WarnOnce:
    """Remembers the warnings that were given."""

    def __init__(self) -> None:
        self.given: set[str] = set()

    def __call__(self, key: str, message: str, stacklevel: int = 3) -> None:
        """Warn, unless a warning of this key was given before."""
        if key not in self.given:
            self.given.add(key)
            warnings.warn(message, stacklevel=stacklevel)

    @contextmanager
    def forgotten(self) -> Iterator[None]:
        """Forget the warnings of the block afterwards, so that they are given again."""
        before = set(self.given)
        try:
            yield
        finally:
            self.given = before

    def concatenation(self, reason: str) -> None:
        """Warn that a prompt is concatenated."""
        self(reason, f"fastprefix: the prompt is concatenated to every row, not shared: {reason}", stacklevel=4)
