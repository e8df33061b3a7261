"""What there is to compile for a target: every row of its tile tables, in every variant that a launch takes it for."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastprefix.backends.launch import tile_config
from fastprefix.backends.launch.tile_config import Lookup
from fastprefix.measure.families import DTYPE_NAMES, FAMILIES, HELPERS, Variant

# Asked for whatever rows there are: each is the largest that some dtype may have.
HEAD_DIMS = (64, 256)
TYPICAL = 2048


@dataclass(frozen=True)
class Call:
    """A call of a kernel for a device of ``capability``; ``name`` is that of a device with a table of its own."""

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


class Launch(NamedTuple):
    """What a call hands to an observer in place of a launch."""

    kernel: Any
    args: tuple[Any, ...]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        """The kernel as tables call it: ``fwd`` is ``_prefix_attn_fwd_kernel``."""
        return str(self.kernel.__name__).removeprefix("_prefix_attn_").removesuffix("_kernel")

    @property
    def fingerprint(self) -> tuple[object, ...]:
        """What Triton compiles anew for."""
        plain = (parameter.do_not_specialize for parameter in getattr(self.kernel, "params", ()))
        args = (type(x) if skip else _kind(x) for x, skip in itertools.zip_longest(self.args, plain))
        return self.name, *args, *sorted(self.options.items())


class Trace(NamedTuple):
    """What a call launches, and what it asked for its own kernel: first and, having seen its arguments, last."""

    launches: list[Launch]
    first: Lookup
    last: Lookup


@dataclass
class Job:
    """One kernel to compile, the ``index``-th launch of the first of ``calls``; all of them launch this very kernel."""

    calls: list[Call]
    index: int


def plan(capabilities: Sequence[int], quick: bool = False) -> tuple[list[Job], list[str]]:
    """The kernels of these targets, each once, and in words what their tables lack.

    ``$FASTPREFIX_TILES``, where it is set, stands in the place of the tables that are shipped.

    Args:
        capabilities: of the targets: 80, 90.
        quick: each row once, in a variant that takes many registers.

    Raises:
        ValueError: a table that is none.
    """
    named = os.environ.get("FASTPREFIX_TILES")
    jobs: dict[object, Job] = {}
    missing: list[str] = []
    for capability in capabilities:
        tables = [(Path(named), "")] if named else list(_shipped(capability))
        if not any(name == "" for _, name in tables):
            missing.append(f"sm_{capability}: got no table sm_{capability}.json")
        used: set[tuple[Path, str, int]] = set()
        for call in (call for _, name in tables for call in _calls(capability, name, quick)):
            try:
                found = trace(call)
            except ValueError as error:
                missing += [] if named else [f"sm_{capability}: {error}"]
                continue
            if found is None:
                continue
            place, row = tile_config.find(found.last.kernel, call.device, *found.last[1:4])
            # A row is compiled for its own head dim; and where no descriptors are wanted, nothing refuses them.
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
                    jobs.setdefault((capability, launch.fingerprint), Job([], index)).calls.append(call)
        for path, _ in tables:
            every = ((path, kernel, row) for kernel, rows in tile_config.read(path).items() for row in range(len(rows)))
            missing += [
                f"sm_{capability}, {path.name}: nothing asks for {x[1]} row {x[2]}" for x in every if x not in used
            ]
    return list(jobs.values()), list(dict.fromkeys(missing))


def trace(call: Call) -> Trace | None:
    """Make a call with launches observed; None where the backend refuses it.

    Raises:
        ValueError: no table has a row for it.
    """
    found = _watched(call, call.variant.P or 16)
    return found if call.variant.P or found is None else _watched(call, found.last.tile.BLOCK_P)


def _watched(call: Call, P: int) -> Trace | None:
    from fastprefix.backends.launch import launcher

    launches: list[Launch] = []
    with (
        tile_config.recorded() as lookups,
        launcher.dry_run(
            lambda kernel, grid, args, options: launches.append(Launch(kernel, args, options)), *call.device
        ),
    ):
        taken = FAMILIES[call.kernel](call.variant, call.D, call.itemsize, call.S, P)
    mine = [x for x in lookups if tile_config.launched(x.kernel) == call.kernel]
    return Trace(launches, mine[0], mine[-1]) if taken else None


def _calls(capability: int, name: str, quick: bool) -> Iterator[Call]:
    """Every kernel at the sizes that its rows are written for, and at those that it must have a row for."""
    for kernel, family in FAMILIES.items():
        sizes = {(D, itemsize, TYPICAL) for D in HEAD_DIMS for itemsize in DTYPE_NAMES}
        for path in tile_config.tables((capability, name)):
            rows = (tile_config.read(path).get(key, []) for key in (kernel, kernel + tile_config.GENERAL))
            sizes |= {(row["D"], row["itemsize"], row.get("S", TYPICAL)) for row in itertools.chain(*rows)}
        for size, variant in itertools.product(sorted(sizes), family.quick if quick else family.variants):
            yield Call(capability, name, kernel, *size, variant)


def _shipped(capability: int) -> Iterator[tuple[Path, str]]:
    """Tables for a target, and the device whose own each is; "" for the architecture's."""
    for path in sorted(tile_config.FOLDER.glob("*.json")):
        if path.stem != "interpreter" and tile_config.capability(path) == capability:
            yield path, "" if path.stem.startswith("sm_") else path.stem


def _kind(x: Any) -> object:
    """Of an argument its dtype, whether it is absent, and of a number whether it is 1 or a multiple of 16."""
    if isinstance(x, torch.Tensor):
        return x.dtype
    if isinstance(x, (tuple, list)):
        return (type(x).__name__, *(_kind(y) for y in x))
    if hasattr(x, "block_shape"):
        return x.base.dtype, tuple(x.block_shape)
    if isinstance(x, int):
        return x == 1, x % 16 == 0
    return type(x).__name__ if isinstance(x, float) else x
