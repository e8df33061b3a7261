"""Blocks that change a setting of the whole process, such as warning filters, and may be open in several threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any


class ProcessWide:
    """Makes a function's context manager one that the first thread enters and the last one leaves; a decorator.

    Were each thread to restore what it had found, a thread that entered after another one and left after it would
    restore the other one's setting, for good.
    """

    def __init__(self, block: Callable[[], AbstractContextManager[Any]]) -> None:
        self.block = block
        self.lock = threading.Lock()
        self.inside = 0
        self.entered: AbstractContextManager[Any] | None = None

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """The setting holds inside the block, in all threads."""
        with self.lock:
            if not self.inside:
                entered = self.block()
                entered.__enter__()
                self.entered = entered
            self.inside += 1
        try:
            yield
        finally:
            with self.lock:
                self.inside -= 1
                if not self.inside and self.entered is not None:
                    self.entered.__exit__(None, None, None)
                    self.entered = None
