"""Autotuning: time candidate tiles of each kernel on this device, and write the best as a table.

A candidate replaces the tile of one kernel; all other tiles stay. It must compile without spills, fit into shared
memory and give right results. Then only the launches of that kernel are timed, in turns with the present tile's.
"""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastprefix.backends.launch import tile_config
from fastprefix.backends.launch.tile_config import Lookup, Tile
from fastprefix.machine.device_errors import describe_error, recover, synchronize
from fastprefix.machine.files import write_atomically
from fastprefix.machine.timing import interleaved, ratio
from fastprefix.measure.kernels.compile_report import usage_of
from fastprefix.measure.kernels.launch_recording import Launch, recorded_launches
from fastprefix.measure.kernels.search_space import candidate_tiles
from fastprefix.measure.kernels.tuning_targets import TuningTarget, tuning_targets
from fastprefix.measure.operator.candidates import backend_reasons
from fastprefix.measure.operator.correctness import broken_rule
from fastprefix.measure.operator.problem import Leaves, Problem

# A candidate must take less than this share of the present tile's time: two runs of one kernel differ by about 2 %.
MAX_TIME_RATIO = 0.98
PROCESSES = 16
WARMUP = 2

# For kernels that split their work: the kernel that reduces the splits, whose time depends on their number.
REDUCED_BY = {
    "bwd_dprefix": "bwd_reduce",
    "epilogue_bwd": "bwd_reduce",
    "decode_prefix": "decode_combine",
    "decode_content": "decode_combine",
}

SearchSpace = Callable[[str, int, Tile], list[Tile]]
Checked = dict[tuple[TuningTarget, str, Tile], "str | None"]
CompileCheck = Callable[[TuningTarget, str, Sequence[Tile]], dict[Tile, str]]


@dataclass
class TuningResult:
    """One kernel at one size: the present tile and the best one, and the seconds that each took."""

    asked: Lookup
    best: Tile
    before: float
    after: float
    tried: int
    discarded: dict[Tile, str]


def tune(
    problems: Sequence[Problem],
    out: Path,
    kernels: Collection[str] | None = None,
    candidates: SearchSpace = candidate_tiles,
    repeats: int = 20,
    report: Callable[[TuningResult], None] = lambda outcome: None,
) -> list[TuningResult]:
    """Find the best tile of each kernel at each size that the problems need; the table is written after every problem.

    Args:
        problems: problems on one device; S = T is training, S < T decoding.
        out: the file of the table; an existing file is replaced.
        kernels: names as in tables; all without.
        candidates: returns the tiles to try, given a kernel, its padded head dim and the present tile.
        repeats: timed rounds of each candidate.
        report: called with each result as soon as it is known.

    Raises:
        ValueError: the Triton backend does not support a problem.
    """
    for problem in problems:
        if reasons := backend_reasons(problem, "triton"):
            raise ValueError(f"--tune: {problem.label}: {'; '.join(reasons)}")
    found: dict[tuple[str, int, int, int], TuningResult] = {}
    checked: Checked = {}
    place = torch.device(problems[0].device)
    with torch.cuda.device(place) if place.type == "cuda" else nullcontext(), _compilers(place) as check_compiles:
        for target in (target for problem in problems for target in tuning_targets(problem)):
            leaves = Leaves.random(target.problem)
            if target.is_refused(leaves):
                continue
            with tile_config.recorded() as lookups:
                target(leaves)
            for asked in dict.fromkeys(lookups):
                if asked[:4] in found or (kernels is not None and asked.kernel not in kernels):
                    continue
                tried = candidates(asked.kernel, asked.D, asked.tile)
                discarded = check_compiles(target, asked.kernel, tried)
                outcome = TuningResult(asked, asked.tile, 0.0, 0.0, len(tried), discarded)
                _choose(outcome, tried, target, leaves, checked, repeats)
                found[asked[:4]] = outcome
                report(outcome)
            _write(out, place, found.values())
    return list(found.values())


@contextmanager
def _compilers(place: torch.device) -> Iterator[CompileCheck]:
    """A function that finds bad candidates by compiling all in parallel, which also fills Triton's cache."""
    from fastprefix.backends.launch import launcher

    if place.type != "cuda":
        yield lambda target, kernel, candidates: {}
        return
    properties: Any = torch.cuda.get_device_properties(place)
    limit = properties.shared_memory_per_block_optin
    device = launcher.device(torch.empty(0, device=place))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(PROCESSES, os.cpu_count() or 1), mp_context=context) as pool:

        def check_compiles(target: TuningTarget, kernel: str, candidates: Sequence[Tile]) -> dict[Tile, str]:
            found = pool.map(_compile_fault, ((target, kernel, tile, device, limit) for tile in candidates))
            return {tile: fault for tile, fault in zip(candidates, found, strict=True) if fault}

        yield check_compiles


def _compile_fault(task: tuple[TuningTarget, str, Tile, tuple[int, str], int]) -> str | None:
    target, kernel, tile, device, limit = task
    try:
        with tile_config.forced(kernel, tile), recorded_launches(*device) as launches:
            target(target.meta_leaves())
        usages = [usage_of(x, device[0]) for x in launches if x.name == tile_config.launched(kernel)]
    except Exception as error:
        return describe_error(error)
    spilt, shared = (max((getattr(x, name) for x in usages), default=0) for name in ("stack", "shared"))
    if spilt:
        return f"spills: {spilt} bytes of stack"
    return f"shared memory: {shared} bytes of {limit}" if shared > limit else None


def _choose(
    outcome: TuningResult,
    candidates: Sequence[Tile],
    target: TuningTarget,
    leaves: Leaves,
    checked: Checked,
    repeats: int,
) -> None:
    """Time the candidates that are not discarded yet, and complete the result."""
    kernel, place, least = outcome.asked.kernel, target.problem.device, MAX_TIME_RATIO
    now = _relaunch_of(target, leaves, kernel, outcome.asked.tile)
    outcome.before = outcome.after = interleaved({"now": now}, repeats, WARMUP, place)["now"].median
    for tile in candidates:
        if tile in outcome.discarded:
            continue
        try:
            if wrong := _wrong(target.reduced(), kernel, tile, checked):
                outcome.discarded[tile] = f"wrong: {wrong}"
                continue
            new = _relaunch_of(target, leaves, kernel, tile)
            times = interleaved({"now": now, "new": new}, repeats, WARMUP, place)
        except Exception as error:
            outcome.discarded[tile] = describe_error(error)
            recover(place, kernel, outcome.discarded[tile])
            continue
        share = ratio(times, "new", "now").median
        if share < least:
            least, outcome.best = share, tile
            outcome.before, outcome.after = times["now"].median, times["new"].median


def _wrong(target: TuningTarget, kernel: str, tile: Tile, checked: Checked) -> str | None:
    """What is wrong with a target's results with this tile; remembered, as many problems reduce to the same."""
    if (target, kernel, tile) not in checked:
        leaves = Leaves.random(target.problem, requires_grad=target.name != "decode")
        with tile_config.forced(kernel, tile):
            checked[target, kernel, tile] = broken_rule(target.problem, leaves, target(leaves))
    return checked[target, kernel, tile]


def _relaunch_of(target: TuningTarget, leaves: Leaves, kernel: str, tile: Tile) -> Callable[[], None]:
    """A function that repeats a kernel's launches in a target, and those of the kernel that reduces its splits."""
    from fastprefix.backends.launch import launcher

    launches: list[tuple[int, Launch]] = []

    def observe(function: Any, programs: int, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        launch = Launch(function, args, options)
        function[(programs,)](*args, **options)
        if launch.name in (tile_config.launched(kernel), REDUCED_BY.get(kernel)):
            launches.append((programs, launch))

    with tile_config.forced(kernel, tile), launcher.dry_run(observe, *launcher.device(leaves.q)):
        target(leaves)
    synchronize(target.problem.device)

    def relaunch() -> None:
        for programs, launch in launches:
            launch.kernel[(programs,)](*launch.args, **launch.options)

    return relaunch


def _write(out: Path, place: torch.device, outcomes: Iterable[TuningResult]) -> None:
    """Write the table with one row in each line."""
    from fastprefix.backends.launch import launcher

    capability, _ = launcher.device(torch.empty(0, device=place))
    rows: dict[str, list[str]] = {}
    for outcome in outcomes:
        asked = outcome.asked._replace(tile=outcome.best)
        rows.setdefault(asked.kernel, []).append("  " + json.dumps(tile_config.as_row(asked)))
    parts = [f' "target": "sm_{capability}"'] if capability else []
    parts += [f" {json.dumps(kernel)}: [\n" + ",\n".join(lines) + "\n ]" for kernel, lines in rows.items()]
    write_atomically(out, "{\n" + ",\n".join(parts) + "\n}\n")
