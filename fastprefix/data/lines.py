"""Reads files of JSON lines, each an object; errors name the file and the line."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def read_lines(path: str | os.PathLike[str], expected: str) -> list[tuple[int, dict[str, Any]]]:
    """The objects of a file with their line numbers, from 1; empty lines are skipped.

    Args:
        path: the file.
        expected: a description of the expected line, for error messages.

    Raises:
        OSError: the file cannot be read.
        ValueError: a line is not a JSON object, or the file has no lines.
    """
    rows = list(_rows(path, expected))
    if not rows:
        raise ValueError(f"{path}: no lines, expected one JSON object with {expected} per line")
    return rows


def _rows(path: str | os.PathLike[str], expected: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(Path(path).read_bytes().split(b"\n"), start=1):
        if line.strip():
            yield number, _object(line, f"{path}, line {number}", expected)


def _object(line: bytes, where: str, expected: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 (byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error.msg} at column {error.colno})") from None
    except RecursionError:
        raise ValueError(f"{where}: not JSON (nested too deeply)") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where}: got {type(row).__name__}, expected an object with {expected}")
    return row


def string(row: dict[str, Any], field: str, where: str, empty: bool = False) -> str:
    """The value of a field that must be a string, not empty unless ``empty``; ValueError naming the field otherwise."""
    if field not in row:
        raise ValueError(f"{where}: the field {field!r} is missing")
    if not isinstance(row[field], str):
        raise ValueError(f"{where}: the field {field!r} is {type(row[field]).__name__}, expected a string")
    if not (row[field] or empty):
        raise ValueError(f"{where}: the field {field!r} is empty")
    return str(row[field])
