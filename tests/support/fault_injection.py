"""The steps of a save, counted: what happens in place of one of them is the test's to say."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from safetensors.torch import save
from torch import Tensor

from fastprefix.hf.storage import validated_files as files

CALLS = ("replace", "fsync", "unlink", "mkdir", "rmdir", "chmod")


@contextmanager
def at_step(number: int, act: Callable[[], Any]) -> Iterator[list[int]]:
    """Do something instead of the number-th step of a save inside the block, or half of it. Yields the steps so far."""
    count = [0]

    def reached() -> bool:
        count[0] += 1
        return count[0] == number

    def before(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            if reached():
                act()
            return original(*args, **options)

        return call

    def tensors(content: dict[str, Tensor], path: str) -> None:
        data, half = save(content), reached()
        Path(path).write_bytes(data[: len(data) // 2] if half else data)
        if half:
            act()

    text = Path.write_text

    def write_text(path: Path, data: str, **options: Any) -> int:
        half = reached()
        written = text(path, data[: len(data) // 2] if half else data, **options)
        if half:
            act()
        return written

    patches = [mock.patch.object(os, name, before(getattr(os, name))) for name in CALLS]
    patches += [mock.patch.object(files, "save_file", tensors), mock.patch.object(Path, "write_text", write_text)]
    for patch in patches:
        patch.start()
    try:
        yield count
    finally:
        for patch in patches:
            patch.stop()
