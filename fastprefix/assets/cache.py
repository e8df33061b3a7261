"""Finds weights in pip packages without importing them, and converts them once into transformers directories."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fastprefix.machine.process_wide import ProcessWide


def find_in_package(package: str, pattern: str) -> Path | None:
    """The first file that matches inside an installed package; None without the package or such a file."""
    # The package is found, not imported: its dependencies (llm, llama-cpp-python) need not be installed.
    spec = importlib.util.find_spec(package.replace("-", "_"))
    folders = [Path(p) for p in (spec.submodule_search_locations or ())] if spec else []
    return next((file for folder in folders for file in sorted(folder.glob(pattern))), None)


def convert_once(target: Path, title: str, convert: Callable[[Path], None]) -> None:
    """Create the folder ``target`` by ``convert(folder)`` unless it exists, and print a line on stderr.

    Several processes may call it at once. An interrupted conversion leaves nothing that a later call would take for a
    model.
    """
    from filelock import FileLock

    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_name(f".{target.name}.lock")):
        if target.is_dir():
            return
        # This process holds the lock, so files that an earlier process left here are not in use.
        for stale in target.parent.glob(f".{target.name}-*"):
            shutil.rmtree(stale, ignore_errors=True)
        print(f"converting {title} once into {target} ...", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as scratch:
            made = Path(scratch) / target.name
            convert(made)
            os.replace(made, target)


@ProcessWide
@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Keep transformers' progress bars off the terminal."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
