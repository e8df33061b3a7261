"""A table of verdicts and times, and its form as JSON, which a damaged file does not have."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple, get_args

from ..types import Mode
from .cells import Cell, Direction
from .identity import Identity
from .routes import backend_of

FORMAT = 1
Result = Literal["right", "wrong", "failed", "crashed", "hung", "refused"]
BAD: tuple[Result, ...] = ("wrong", "failed", "crashed", "hung")
Variant = Literal["plain", "masked", "bank"]
VARIANTS: tuple[Variant, ...] = get_args(Variant)


@dataclass(frozen=True)
class Verdict:
    """What became of one route on one cell.

    Attributes:
        result: ``failed`` is an exception, ``crashed`` the end of the process, ``refused`` reasons of the backend's.
        worst: the largest error as a share of what the error rule allows; None where nothing was computed.
        detail: the tensor and shape of the worst error, or what happened, in words.
        date: of the check, UTC, ``2026-11-27``.
    """

    result: Result
    worst: float | None = None
    detail: str = ""
    date: str = ""


class Bucket(NamedTuple):
    """The shape of a timed call, which stands for all shapes near it. ``lowest`` is a backward of the prefix alone."""

    mode: Mode
    dtype: str
    D: int
    variant: Variant  # with a padding mask, or a prefix of each row's own in a bank
    B: int
    H: int
    H_kv: int
    S: int
    T: int
    P: int

    @property
    def direction(self) -> Direction:
        """Of the cells that its routes must be right in."""
        return "backward" if self.mode == "lowest" else self.mode

    def __str__(self) -> str:
        sizes = " ".join(f"{name}{value}" for name, value in zip(self._fields[4:], self[4:], strict=True))
        return f"{self.mode} {self.dtype} D{self.D} {self.variant} {sizes}"

    @classmethod
    def parse(cls, text: str) -> Bucket:
        """The inverse of ``str``.

        Raises:
            ValueError: the text names no bucket.
        """
        mode, dtype, width, variant, *sizes = text.split(" ")
        if mode not in get_args(Mode) or variant not in VARIANTS or len(sizes) != len(cls._fields) - 4:
            raise ValueError(f"bucket: got {text!r}, expected a mode, a dtype, a head dim and sizes")
        numbers = [
            int(size.removeprefix(name)) for name, size in zip(("D", *cls._fields[4:]), (width, *sizes), strict=True)
        ]
        if min(numbers) < 0:
            raise ValueError(f"bucket: got {text!r}, expected no negative size")
        return cls(mode, dtype, numbers[0], variant, *numbers[1:])  # type: ignore[arg-type]


@dataclass
class Table:
    """Verdicts by cell and route, and median seconds by bucket and route, of one identity.

    ``failures`` are verdicts on routes that were right on small calls, and were not on the larger one of a bucket. They
    hold for all calls of the bucket's dtype and direction, until the route is timed in that bucket.
    """

    identity: Identity
    verdicts: dict[Cell, dict[str, Verdict]] = field(default_factory=dict)
    times: dict[Bucket, dict[str, float]] = field(default_factory=dict)
    failures: dict[Bucket, dict[str, Verdict]] = field(default_factory=dict)

    def verdict(self, cell: Cell, route: str) -> Verdict | None:
        """What is known of a route on a cell."""
        return self.verdicts.get(cell, {}).get(route)

    def add(self, cell: Cell, route: str, verdict: Verdict) -> None:
        """Note a verdict."""
        self.verdicts.setdefault(cell, {})[route] = verdict

    def update(self, other: Table) -> None:
        """Take over everything that another table of the same identity has; where both know, the other's counts."""
        for cell, found in other.verdicts.items():
            self.verdicts.setdefault(cell, {}).update(found)
        for bucket, times in other.times.items():
            self.times.setdefault(bucket, {}).update(times)
            for route in times:
                self.failures.get(bucket, {}).pop(route, None)
        for bucket, found in other.failures.items():
            self.failures.setdefault(bucket, {}).update(found)
            for route in found:
                self.times.get(bucket, {}).pop(route, None)

    def failure(self, route: str, cell: Cell) -> Verdict | None:
        """How a route was not right on a larger call of a cell's dtype and direction."""
        for bucket, found in self.failures.items():
            if route in found and bucket.dtype == cell.dtype and bucket.direction == cell.direction:
                return found[route]
        return None

    def bad(self) -> set[tuple[str, str]]:
        """Names of the cells and buckets, and the routes that were wrong, failed, crashed or hung there."""
        places = [*self.verdicts.items(), *self.failures.items()]
        return {(str(place), route) for place, found in places for route, x in found.items() if x.result in BAD}

    def to_json(self) -> str:
        """The table as text, with a checksum of its content."""
        content = {
            "format": FORMAT,
            "identity": self.identity,
            "verdicts": {
                str(cell): {route: asdict(verdict) for route, verdict in sorted(found.items())}
                for cell, found in sorted(self.verdicts.items())
            },
            "times": {str(bucket): dict(sorted(found.items())) for bucket, found in sorted(self.times.items())},
            "failures": {
                str(bucket): {route: asdict(verdict) for route, verdict in sorted(found.items())}
                for bucket, found in sorted(self.failures.items())
            },
        }
        return json.dumps({**content, "checksum": _checksum(content)}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Table:
        """The table of a text.

        Raises:
            ValueError: it is no such table, or was damaged.
        """
        try:
            content = json.loads(text)
            checksum = content.pop("checksum")
            if content["format"] != FORMAT or checksum != _checksum(content):
                raise ValueError("another format or checksum")
            verdicts = {Cell.parse(name): _verdicts(found) for name, found in content["verdicts"].items()}
            times = {Bucket.parse(name): _times(found) for name, found in content["times"].items()}
            failures = {Bucket.parse(name): _verdicts(found) for name, found in content["failures"].items()}
            return cls(dict(content["identity"]), verdicts, times, failures)
        except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
            raise ValueError(f"no table of verdicts ({type(error).__name__}: {error})") from error


def _verdicts(found: Mapping[str, Any]) -> dict[str, Verdict]:
    verdicts = {route: Verdict(**fields) for route, fields in found.items()}
    for route, verdict in verdicts.items():
        backend_of(route)
        if verdict.result not in get_args(Result):
            raise ValueError(f"verdict: got {verdict.result!r}, expected one of {', '.join(get_args(Result))}")
        if not isinstance(verdict.worst, int | float | None):
            raise ValueError(f"worst: got {verdict.worst!r}, expected a number")
    return verdicts


def _times(found: Mapping[str, Any]) -> dict[str, float]:
    times = {route: float(seconds) for route, seconds in found.items()}
    for route, seconds in times.items():
        backend_of(route)
        if not (math.isfinite(seconds) and seconds > 0):
            raise ValueError(f"seconds: got {seconds}, expected a positive number")
    return times


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
