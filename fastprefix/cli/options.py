"""Checks of option values: numbers, and files and folders, which are checked before anything is loaded."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable
from pathlib import Path


def whole_number(least: int = 1, most: int | None = None) -> Callable[[str], int]:
    """An argparse type: a whole number within bounds."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number, at least {least}") from None
        if value < least or (most is not None and value > most):
            bounds = f"at least {least}" if most is None else f"{least} to {most}"
            raise argparse.ArgumentTypeError(f"got {value}, expected {bounds}")
        return value

    return read


def positive_number(text: str) -> float:
    """An argparse type: a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (value > 0 and math.isfinite(value)):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a positive number")
    return value


def probability(text: str) -> float:
    """An argparse type: a number from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0.0 <= value <= 1.0:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number from 0 to 1")
    return value


def check_file(option: str, file: str) -> None:
    """Raise ValueError naming the option unless there is a file to read."""
    path = Path(file)
    if not path.exists():
        raise ValueError(f"{option}: no file {file}")
    if path.is_dir():
        raise ValueError(f"{option}: {file} is a folder, expected a file")
    if not os.access(path, os.R_OK):
        raise ValueError(f"{option}: {file} cannot be read")


def check_output(option: str, folder: str) -> None:
    """Raise ValueError naming the option unless files can be written to this folder, which need not exist yet."""
    for path in (Path(folder), *Path(folder).parents):
        if path.is_dir():
            if not os.access(path, os.W_OK | os.X_OK):
                raise ValueError(f"{option}: {path} cannot be written to, expected a folder that can")
            return
        if path.exists() or path.is_symlink():
            raise ValueError(f"{option}: {path} is a file, expected a folder")
