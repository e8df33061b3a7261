"""Time candidate tiles of each kernel on this device, and write the best as a table.

A candidate takes the place of one kernel's tile and leaves all others as they are. It has to compile without spills,
to fit, and to keep the results right; then that kernel's launches alone are timed, in turns with the present tile's.
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
from fastprefix.measure.check import broken_rule
from fastprefix.measure.configurations import Launch
from fastprefix.measure.grids import grid
from fastprefix.measure.peers import backend_reasons
from fastprefix.measure.problem import Leaves, Problem
from fastprefix.measure.resources import usage_of
from fastprefix.measure.routes import Route, routes
from fastprefix.measure.run import recover, synchronize, why
from fastprefix.measure.tables import write_atomically
from fastprefix.measure.timing import interleaved, ratio

# Only what is faster by this much takes the present tile's place: two runs of one kernel differ by about as much.
WORTH = 0.98
PROCESSES = 16
WARMUP = 2

# Kernels without tiles that put together what so many splits left.
FOLLOWS = {
    "bwd_dprefix": "bwd_reduce",
    "epilogue_bwd": "bwd_reduce",
    "decode_prefix": "decode_combine",
    "decode_content": "decode_combine",
}

Grid = Callable[[str, int, Tile], list[Tile]]
Checked = dict[tuple[Route, str, Tile], "str | None"]
Judge = Callable[[Route, str, Sequence[Tile]], dict[Tile, str]]


@dataclass
class Outcome:
    """One kernel at one size: what is taken now and what was best, and the seconds that each took in its turns."""

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
    candidates: Grid = grid,
    repeats: int = 20,
    report: Callable[[Outcome], None] = lambda outcome: None,
) -> list[Outcome]:
    """Find the best tile of each kernel at each size that the problems need, and write them after every problem.

    Args:
        problems: on one device; training where S = T, else decoding.
        out: the table; one that is there is replaced.
        kernels: names as in tables; all without.
        candidates: tiles to try, given a kernel, its padded head dim and the present tile.
        repeats: timed rounds of each candidate.
        report: told each outcome as soon as there is one.

    Raises:
        ValueError: the Triton backend cannot take a problem.
    """
    for problem in problems:
        if reasons := backend_reasons(problem, "triton"):
            raise ValueError(f"--tune: {problem.label}: {'; '.join(reasons)}")
    found: dict[tuple[str, int, int, int], Outcome] = {}
    checked: Checked = {}
    place = torch.device(problems[0].device)
    with torch.cuda.device(place) if place.type == "cuda" else nullcontext(), _compilers(place) as judge:
        for route in (route for problem in problems for route in routes(problem)):
            leaves = Leaves.random(route.problem)
            if route.refuses(leaves):
                continue
            with tile_config.recorded() as lookups:
                route(leaves)
            for asked in dict.fromkeys(lookups):
                if asked[:4] in found or (kernels is not None and asked.kernel not in kernels):
                    continue
                tried = candidates(asked.kernel, asked.D, asked.tile)
                outcome = Outcome(asked, asked.tile, 0.0, 0.0, len(tried), judge(route, asked.kernel, tried))
                _choose(outcome, tried, route, leaves, checked, repeats)
                found[asked[:4]] = outcome
                report(outcome)
            _write(out, place, found.values())
    return list(found.values())


@contextmanager
def _compilers(place: torch.device) -> Iterator[Judge]:
    """What tells bad candidates by compiling all of them at once, which also fills Triton's cache for the others."""
    from fastprefix.backends.launch import launcher

    if place.type != "cuda":
        yield lambda route, kernel, candidates: {}
        return
    properties: Any = torch.cuda.get_device_properties(place)
    limit = properties.shared_memory_per_block_optin
    device = launcher.device(torch.empty(0, device=place))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(PROCESSES, os.cpu_count() or 1), mp_context=context) as pool:

        def judge(route: Route, kernel: str, candidates: Sequence[Tile]) -> dict[Tile, str]:
            found = pool.map(_flaw, ((route, kernel, tile, device, limit) for tile in candidates))
            return {tile: flaw for tile, flaw in zip(candidates, found, strict=True) if flaw}

        yield judge


def _flaw(task: tuple[Route, str, Tile, tuple[int, str], int]) -> str | None:
    from fastprefix.backends.launch import launcher

    route, kernel, tile, device, limit = task
    launches: list[Launch] = []

    def observe(function: Any, programs: int, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        launches.append(Launch(function, args, options))

    try:
        with tile_config.forced(kernel, tile), launcher.dry_run(observe, *device):
            route(route.blank())
        usages = [usage_of(x, device[0]) for x in launches if x.name == tile_config.launched(kernel)]
    except Exception as error:
        return why(error)
    spilt, shared = (max((getattr(x, name) for x in usages), default=0) for name in ("stack", "shared"))
    if spilt:
        return f"spills: {spilt} bytes of stack"
    return f"shared memory: {shared} bytes of {limit}" if shared > limit else None


def _choose(
    outcome: Outcome, candidates: Sequence[Tile], route: Route, leaves: Leaves, checked: Checked, repeats: int
) -> None:
    """Time what is not discarded yet, and fill in the rest of the outcome."""
    kernel, place, least = outcome.asked.kernel, route.problem.device, WORTH
    now = _launches(route, leaves, kernel, outcome.asked.tile)
    outcome.before = outcome.after = interleaved({"now": now}, repeats, WARMUP, place)["now"].median
    for tile in candidates:
        if tile in outcome.discarded:
            continue
        try:
            if wrong := _wrong(route.small(), kernel, tile, checked):
                outcome.discarded[tile] = f"wrong: {wrong}"
                continue
            new = _launches(route, leaves, kernel, tile)
            times = interleaved({"now": now, "new": new}, repeats, WARMUP, place)
        except Exception as error:
            outcome.discarded[tile] = why(error)
            recover(place, kernel, outcome.discarded[tile])
            continue
        share = ratio(times, "new", "now").median
        if share < least:
            least, outcome.best = share, tile
            outcome.before, outcome.after = times["now"].median, times["new"].median


def _wrong(route: Route, kernel: str, tile: Tile, checked: Checked) -> str | None:
    """What is off in a route's results with this tile; seen once, since many problems come down to the same."""
    if (route, kernel, tile) not in checked:
        leaves = Leaves.random(route.problem, requires_grad=route.name != "decode")
        with tile_config.forced(kernel, tile):
            checked[route, kernel, tile] = broken_rule(route.problem, leaves, route(leaves))
    return checked[route, kernel, tile]


def _launches(route: Route, leaves: Leaves, kernel: str, tile: Tile) -> Callable[[], None]:
    """The launches of a kernel in a route, and of the one whose work depends on its tile, made once more."""
    from fastprefix.backends.launch import launcher

    launches: list[tuple[int, Launch]] = []

    def observe(function: Any, programs: int, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        launch = Launch(function, args, options)
        function[(programs,)](*args, **options)
        if launch.name in (tile_config.launched(kernel), FOLLOWS.get(kernel)):
            launches.append((programs, launch))

    with tile_config.forced(kernel, tile), launcher.dry_run(observe, *launcher.device(leaves.q)):
        route(leaves)
    synchronize(route.problem.device)

    def again() -> None:
        for programs, launch in launches:
            launch.kernel[(programs,)](*launch.args, **launch.options)

    return again


def _write(out: Path, place: torch.device, outcomes: Iterable[Outcome]) -> None:
    """The table, a row a line."""
    from fastprefix.backends.launch import launcher

    capability, _ = launcher.device(torch.empty(0, device=place))
    rows: dict[str, list[str]] = {}
    for outcome in outcomes:
        asked = outcome.asked._replace(tile=outcome.best)
        rows.setdefault(asked.kernel, []).append("  " + json.dumps(tile_config.as_row(asked)))
    parts = [f' "target": "sm_{capability}"'] if capability else []
    parts += [f" {json.dumps(kernel)}: [\n" + ",\n".join(lines) + "\n ]" for kernel, lines in rows.items()]
    write_atomically(out, "{\n" + ",\n".join(parts) + "\n}\n")
