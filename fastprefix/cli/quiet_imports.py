"""Keep messages of imported libraries that mean nothing to the user of a command off the terminal."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

# A logger, and how the template of its message begins. Both come from importing torchao, as transformers does: from
# extensions built for another CUDA or Python, and from Enums that its own start-up registers.
_NOISE = {
    "torchao": "Failed to load ",
    "torch.utils._pytree": "%s is an Enum subclass and is now natively supported",
}


@contextmanager
def quiet_imports() -> Iterator[None]:
    """Drop these messages, and no others, inside the block."""
    filters = {name: _Filter(start) for name, start in _NOISE.items()}
    for name, one in filters.items():
        logging.getLogger(name).addFilter(one)
    try:
        yield
    finally:
        for name, one in filters.items():
            logging.getLogger(name).removeFilter(one)


class _Filter(logging.Filter):
    def __init__(self, start: str) -> None:
        super().__init__()
        self.start = start

    def filter(self, record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith(self.start)
