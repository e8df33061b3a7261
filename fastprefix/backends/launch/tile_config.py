"""Tile sizes by device and shape, from JSON: no search where a user waits.

A table is ``{kernel: [{"D": 64, "itemsize": 2, "S": 2048, "BLOCK_M": ..., ...}, ...]}``. Of the rows with the
element size and the smallest ``D`` that holds the head dims, the one with the nearest ``S`` (in octaves) is taken.
Tables in turn, first those with rows for this very ``D``: ``$FASTPREFIX_TILES``, the device's name, its architecture,
sm_80 (plain loads, small tiles).
A table for one device says what it was made for in ``"target": "sm_90"``; an architecture's table is named so.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

FOLDER = Path(__file__).parent / "tiles"
SAFE = "sm_80"
# Ends the names of tiles of the same kernel for every argument and any strides.
GENERAL = "_general"


@dataclass(frozen=True)
class Tile:
    """How one kernel is cut: rows, keys and prefix tokens a tile, warps, pipeline stages, the copy engine or not."""

    BLOCK_M: int = 64
    BLOCK_N: int = 64
    BLOCK_P: int = 64  # at most: a short prefix takes the next power of two of its own length
    num_warps: int = 4
    num_stages: int = 2
    TMA: bool = False
    SPLIT: bool = True  # a loop of its own for tiles that need no mask; its registers can be one too many


class Lookup(NamedTuple):
    """A question that a launch asked, and its answer."""

    kernel: str
    D: int
    itemsize: int
    S: int
    tile: Tile


Row = dict[str, Any]
Table = dict[str, list[Row]]

# A row's numbers: least, most, and whether only powers of two will do, which tl.arange and tl.dot want.
_NUMBERS = {
    "D": (16, 256, True),
    "itemsize": (2, 4, True),
    "S": (1, 2**31, False),
    "BLOCK_M": (16, 1024, True),
    "BLOCK_N": (16, 1024, True),
    "BLOCK_P": (16, 1024, True),
    "num_warps": (1, 32, True),
    "num_stages": (1, 8, False),
}

# Whole processes, not contexts: autograd runs the backward in threads of its own.
_forced: dict[str, Tile] = {}
_recorders: list[list[Lookup]] = []


def tile(kernel: str, device: tuple[int, str], D: int, itemsize: int, S: int) -> Tile:
    """The tile of a kernel for padded head dim ``D``, ``itemsize`` bytes an element and ``S`` query tokens.

    Raises:
        ValueError: a table that is no table, or has no row for this.
    """
    found = _forced.get(kernel)
    if found is None:
        path, row = find(kernel, device, D, itemsize, S)
        found = at(path, kernel, row)
    for recorder in _recorders:
        recorder.append(Lookup(kernel, D, itemsize, S, found))
    return found


def find(kernel: str, device: tuple[int, str], D: int, itemsize: int, S: int) -> tuple[Path, int]:
    """The table that answers, and which row of its kernel does.

    Raises:
        ValueError: as :func:`tile`.
    """
    return _find(kernel, device, D, itemsize, max(S, 1).bit_length(), os.environ.get("FASTPREFIX_TILES"))


def has(kernel: str, device: tuple[int, str], D: int, itemsize: int, S: int) -> bool:
    """Whether some table has a row for this."""
    return _has(kernel, device, D, itemsize, os.environ.get("FASTPREFIX_TILES"))


@functools.lru_cache(maxsize=4096)
def at(path: Path, kernel: str, row: int) -> Tile:
    """The tile in a row of a table."""
    fields = read(path)[kernel][row]
    return Tile(**{name: fields[name] for name in Tile.__dataclass_fields__ if name in fields})


def tables(device: tuple[int, str]) -> list[Path]:
    """The tables of a device, in the order in which they are asked."""
    return _paths(device, os.environ.get("FASTPREFIX_TILES"))


@contextmanager
def forced(kernel: str, tile: Tile) -> Iterator[None]:
    """This tile for a kernel, whatever the tables say, in every thread of the process."""
    before = _forced.get(kernel)
    _forced[kernel] = tile
    try:
        yield
    finally:
        if before is None:
            del _forced[kernel]
        else:
            _forced[kernel] = before


@contextmanager
def recorded() -> Iterator[list[Lookup]]:
    """What launches ask for meanwhile, in order."""
    found: list[Lookup] = []
    _recorders.append(found)
    try:
        yield found
    finally:
        _recorders[:] = [x for x in _recorders if x is not found]


def read(path: Path) -> Table:
    """A table's rows by kernel.

    Raises:
        ValueError: it is not there or no table; a bad row is named with its field.
    """
    return _load(path)[0]


def capability(path: Path) -> int:
    """The compute capability that a table was made for, 90 for sm_90.

    Raises:
        ValueError: as :func:`read`, or it does not say.
    """
    named = _load(path)[1] or path.stem
    if not re.fullmatch(r"sm_\d+", named):
        raise ValueError(f'tiles: {path}: got no target, expected "target": "sm_90" or so beside its kernels')
    return int(named.removeprefix("sm_"))


def launched(kernel: str) -> str:
    """The kernel itself, whichever of its tiles is meant."""
    return kernel.removesuffix(GENERAL)


def forget() -> None:
    """Empty the caches: tables are read once and kept."""
    for cached in (_load, _find, _has, at):
        cached.cache_clear()


def slug(name: str) -> str:
    """A device's name as a file's."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def as_row(lookup: Lookup) -> Row:
    """A row that answers a question so."""
    return {"D": lookup.D, "itemsize": lookup.itemsize, "S": lookup.S, **asdict(lookup.tile)}


@functools.lru_cache(maxsize=4096)
def _find(
    kernel: str, device: tuple[int, str], D: int, itemsize: int, octave: int, named: str | None
) -> tuple[Path, int]:
    # Rows for this very head dim first: a table of one device may have been tuned for others only.
    for most in (D, math.inf):
        for path in _paths(device, named):
            index = _nearest(read(path).get(kernel, []), D, itemsize, octave, most)
            if index is not None:
                return path, index
    raise ValueError(f"tiles: no row for {kernel}, D = {D}, itemsize = {itemsize}")


@functools.lru_cache(maxsize=4096)
def _has(kernel: str, device: tuple[int, str], D: int, itemsize: int, named: str | None) -> bool:
    return any(_nearest(read(path).get(kernel, []), D, itemsize, 0) is not None for path in _paths(device, named))


def _paths(device: tuple[int, str], named: str | None) -> list[Path]:
    capability, name = device
    own = [Path(named)] if named else []
    names = (slug(name), f"sm_{capability}", SAFE) if capability else ("interpreter",)
    return own + [path for path in (FOLDER / f"{x}.json" for x in names) if path.exists()]


def _nearest(rows: list[Row], D: int, itemsize: int, octave: int, most: float = math.inf) -> int | None:
    fitting = [i for i, row in enumerate(rows) if row["itemsize"] == itemsize and D <= row["D"] <= most]
    if not fitting:
        return None
    width = min(rows[i]["D"] for i in fitting)
    return min(
        (i for i in fitting if rows[i]["D"] == width),
        key=lambda i: abs(math.log2(rows[i].get("S", 2048)) + 1 - octave),
    )


@functools.lru_cache(maxsize=64)
def _load(path: Path) -> tuple[Table, str | None]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"tiles: got {path}, expected a table of tiles ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"tiles: {path}: got {type(content).__name__}, expected {{kernel: [row, ...]}}")
    target = content.pop("target", None)
    if target is not None and not (isinstance(target, str) and re.fullmatch(r"sm_\d+", target)):
        raise ValueError(f"tiles: {path}, target: got {target!r}, expected sm_90 or so")
    for kernel, rows in content.items():
        if not isinstance(rows, list):
            raise ValueError(f"tiles: {path}, {kernel}: got {rows!r}, expected a list of rows")
        for index, row in enumerate(rows):
            _check(f"tiles: {path}, {kernel} row {index}", row)
    return content, target


def _check(where: str, row: object) -> None:
    if not isinstance(row, dict):
        raise ValueError(f"{where}: got {row!r}, expected an object")
    for field, value in row.items():
        if field in ("TMA", "SPLIT"):
            good, expected = isinstance(value, bool), "true or false"
        elif field in _NUMBERS:
            least, most, power = _NUMBERS[field]
            expected = f"{'a power of two' if power else 'a whole number'} from {least} to {most}"
            good = isinstance(value, int) and not isinstance(value, bool) and least <= value <= most
            good = good and not (power and value & (value - 1))
        else:
            good, expected = False, f"one of the fields {', '.join((*_NUMBERS, 'TMA', 'SPLIT'))}"
        if not good:
            raise ValueError(f"{where}, {field}: got {value!r}, expected {expected}")
    for field in ("D", "itemsize"):
        if field not in row:
            raise ValueError(f"{where}, {field}: got nothing, expected a number")
