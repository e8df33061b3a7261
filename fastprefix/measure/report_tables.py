"""Text and Markdown tables, and result files in JSON that are complete at every moment and name their machine."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from fastprefix.machine.device import name
from fastprefix.machine.files import write_atomically

Row = Sequence[object]


def markdown_table(headers: Sequence[str], rows: Sequence[Row]) -> str:
    """A GitHub table; bars inside cells are escaped."""
    lines = ["| " + " | ".join(str(x).replace("|", "\\|") for x in row) + " |" for row in (headers, *rows)]
    lines.insert(1, "|" + "|".join(" --- " if i == 0 else " ---: " for i in range(len(headers))) + "|")
    return "\n".join(lines)


def seconds(value: float) -> str:
    """A time with three significant digits and its unit: ``1.23 ms``."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if value >= size or unit == "us":
            return f"{value / size:.3g} {unit}" if value < 1000 * size else f"{value / size:.0f} {unit}"
    raise AssertionError


def mebibytes(value: int) -> str:
    """A number of bytes as ``12.3 MiB``."""
    return f"{value / 2**20:.1f} MiB"


def environment(device: torch.device | str) -> dict[str, Any]:
    """Where and with which versions a result was measured: device, versions, threads, UTC date."""
    kind = torch.device(device).type
    return {
        "device": name(torch.device(device)),
        "device_type": kind,
        "torch": torch.__version__,
        "cuda": torch.version.cuda if kind == "cuda" else None,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


class ResultFile:
    """A JSON file ``{"environment": {...}, "rows": [...]}`` that is rewritten after every row.

    Rows are dicts with a ``"key"``; a row with the key of an earlier one replaces it.

    Args:
        resume: keep the rows of an existing file.

    Raises:
        ValueError: ``resume`` is set and the existing file is not such a file.
    """

    def __init__(self, path: Path, environment: dict[str, Any], resume: bool = False) -> None:
        self.path, self.environment = path, environment
        self.rows: list[dict[str, Any]] = []
        if resume and path.exists():
            try:
                self.rows = list(json.loads(path.read_text())["rows"])
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}: no result file ({error})") from error

    def __contains__(self, key: str) -> bool:
        return any(row["key"] == key for row in self.rows)

    def add(self, row: dict[str, Any]) -> None:
        """Add a row, or replace the row with its key, and write the file."""
        self.rows = [x for x in self.rows if x["key"] != row["key"]] + [row]
        self.write()

    def write(self) -> None:
        """Write the rows so far."""
        data = {"environment": self.environment, "rows": self.rows}
        write_atomically(self.path, json.dumps(data, indent=1) + "\n")
