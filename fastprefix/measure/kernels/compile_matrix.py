"""The kernels to compile for a target: every row of its tile tables in every variant for which a launch takes it."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from fastprefix.backends.launch import tile_config
from fastprefix.backends.launch.tile_config import Lookup
from fastprefix.measure.kernels.kernel_calls import DTYPE_NAMES, HELPERS, KERNEL_CALLS, Variant
from fastprefix.measure.kernels.launch_recording import Launch, recorded_launches

# These head dims must have rows: each is the largest that some dtype may have.
HEAD_DIMS = (64, 256)
TYPICAL = 2048


@dataclass(frozen=True)
class CompileCase:
    """A call of a kernel on a device of ``capability``; ``name`` is empty unless the device has its own table."""

    capability: int
    name: str
    kernel: str
    D: int
    itemsize: int
    S: int
    variant: Variant

    @property
    def device(self) -> tuple[int, str]:
        return self.capability, self.name


class Trace(NamedTuple):
    """A call's launches, and its look-ups of its kernel's tile: the first and, after seeing its arguments, the last."""

    launches: list[Launch]
    first: Lookup
    last: Lookup


@dataclass
class CompileJob:
    """One kernel to compile: launch ``index`` of the first of ``calls``, all of which share the compilation."""

    calls: list[CompileCase]
    index: int


def plan_compilation(capabilities: Sequence[int], quick: bool = False) -> tuple[list[CompileJob], list[str]]:
    """The kernels of these targets, each once, and what their tables lack, in words.

    If ``$FASTPREFIX_TILES`` is set, it replaces the shipped tables.

    Args:
        capabilities: compute capabilities of the targets: 80, 90.
        quick: take each row once, in a variant that needs many registers.

    Raises:
        ValueError: a file is not a tile table.
    """
    named = os.environ.get("FASTPREFIX_TILES")
    jobs: dict[object, CompileJob] = {}
    missing: list[str] = []
    for capability in capabilities:
        tables = [(Path(named), "")] if named else list(_shipped(capability))
        if not any(name == "" for _, name in tables):
            missing.append(f"sm_{capability}: got no table sm_{capability}.json")
        used: set[tuple[Path, str, int]] = set()
        for call in (call for _, name in tables for call in _calls(capability, name, quick)):
            try:
                found = trace_launches(call)
            except ValueError as error:
                missing += [] if named else [f"sm_{capability}: {error}"]
                continue
            if found is None:
                continue
            place, row = tile_config.find(found.last.kernel, call.device, *found.last[1:4])
            # A row is compiled for its own head dim only; strides matter only if the tile wants descriptors.
            idle = "strides" in call.variant.has and not found.first.tile.TMA
            if (
                idle
                or tile_config.read(place)[found.last.kernel][row]["D"] != call.D
                or (named and place != Path(named))
            ):
                continue
            seen = (place, found.last.kernel, row) in used
            used.add((place, found.last.kernel, row))
            if quick and seen:
                continue
            for index, launch in enumerate(found.launches):
                if launch.name in (call.kernel, *HELPERS):
                    jobs.setdefault((capability, launch.fingerprint), CompileJob([], index)).calls.append(call)
        for path, _ in tables:
            every = ((path, kernel, row) for kernel, rows in tile_config.read(path).items() for row in range(len(rows)))
            missing += [
                f"sm_{capability}, {path.name}: nothing asks for {x[1]} row {x[2]}" for x in every if x not in used
            ]
    return list(jobs.values()), list(dict.fromkeys(missing))


def trace_launches(call: CompileCase) -> Trace | None:
    """Make a call and record its launches; None where the backend refuses the call.

    Raises:
        ValueError: no table has a row for the call.
    """
    found = _record_call(call, call.variant.P or 16)
    return found if call.variant.P or found is None else _record_call(call, found.last.tile.BLOCK_P)


def _record_call(call: CompileCase, P: int) -> Trace | None:
    with tile_config.recorded() as lookups, recorded_launches(*call.device) as launches:
        taken = KERNEL_CALLS[call.kernel](call.variant, call.D, call.itemsize, call.S, P)
    mine = [x for x in lookups if tile_config.launched(x.kernel) == call.kernel]
    return Trace(launches, mine[0], mine[-1]) if taken else None


def _calls(capability: int, name: str, quick: bool) -> Iterator[CompileCase]:
    """The calls of every kernel, at the sizes of its rows and at those for which it must have a row."""
    for kernel, kernel_call in KERNEL_CALLS.items():
        sizes = {(D, itemsize, TYPICAL) for D in HEAD_DIMS for itemsize in DTYPE_NAMES}
        for path in tile_config.tables((capability, name)):
            rows = (tile_config.read(path).get(key, []) for key in (kernel, kernel + tile_config.GENERAL))
            sizes |= {(row["D"], row["itemsize"], row.get("S", TYPICAL)) for row in itertools.chain(*rows)}
        for size, variant in itertools.product(sorted(sizes), kernel_call.quick if quick else kernel_call.variants):
            yield CompileCase(capability, name, kernel, *size, variant)


def _shipped(capability: int) -> Iterator[tuple[Path, str]]:
    """The shipped tables for a target, each with its device's name; empty for the table of the architecture."""
    for path in sorted(tile_config.FOLDER.glob("*.json")):
        if path.stem != "interpreter" and tile_config.capability(path) == capability:
            yield path, "" if path.stem.startswith("sm_") else path.stem
