"""``verify``: check every route on cells, time those that are right, remember what was found."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path

import torch

from ..backends import cuda
from ..errors import fail
from ..machine import device as machine
from ..machine import processor
from . import plan, report, store
from .cells import Cell
from .child import ChildError
from .identity import identity
from .routes import backend_of, routes
from .supervisor import Outcome, Supervisor, Task
from .table import Bucket, Result, Table, Verdict

BUDGET = {"cpu": 60.0}
GPU_BUDGET = 90.0
PATIENCE = {"cpu": 20.0}
GPU_PATIENCE = 30.0  # some kernels may be compiled between two signs of life
TIMING_SHARE = 0.4  # of the budget
MOST_WORKERS = 14
MEMORY_OF_A_WORKER = 2**30  # bytes of a GPU, for a context and small tensors; and of main memory

Progress = Callable[[str], None]


@dataclass
class Report:
    """What ``verify`` found; as text, a table for people.

    Attributes:
        table: the verdicts and times.
        file: where they are remembered; None where nothing could be written.
        seconds: that it took.
        left_out: cells and buckets that the budget did not reach; they are verified when a call needs them.
    """

    table: Table
    file: Path | None
    seconds: float
    left_out: int = 0

    @property
    def wrong(self) -> list[str]:
        """Routes that were wrong, failed, crashed or hung somewhere."""
        return sorted({route for _, route in self.table.bad()})

    def __str__(self) -> str:
        lines = [report.text(self.table)]
        if self.left_out:
            told = "checks and timings were not reached: a model, or a call on a GPU, that needs one makes it"
            lines.append(f"{self.left_out} {told}")
        where = "for this process alone" if self.file is None else f"in {self.file}"
        return "\n".join([*lines, f"{self.seconds:.1f} s; remembered {where}"])


def verify(
    device: torch.device | str | None = None,
    *,
    out: str | Path | None = None,
    budget: float | None = None,
    progress: Progress = lambda line: None,
) -> Report:
    """Check every backend on a device against the reference in fp64, and time those that are right.

    ``backend="auto"`` then takes, for each kind of call, the fastest that was right there. The work is done in child
    processes: a kernel that crashes or hangs is a verdict, and harms no one. It is remembered in the cache folder, for
    this device, driver, torch, Triton and these sources, so that it is needed once.

    Args:
        device: ``"cuda:1"`` or so; without one, the first GPU, else the processor.
        out: a file to write instead of the cache folder's, for ``FASTPREFIX_VERIFY=<file>`` on machines like this one.
        budget: seconds after which no further check begins; 60 on a processor and 90 on a GPU without one.
        progress: called with a line of text now and then.

    Returns:
        A :class:`Report`; ``print`` shows its table.

    Raises:
        ValueError: ``device`` is no device that is here, or ``budget`` no positive number.
        OSError: ``out`` cannot be written, or no child process can be started.
    """
    chosen = _device(device)
    kind = machine.kind(chosen)
    seconds = budget if budget is not None else BUDGET.get(kind, GPU_BUDGET)
    if not seconds > 0:
        raise fail("budget", seconds, "a positive number of seconds")
    file = None if out is None else Path(out).expanduser()
    if file is not None:  # now, not when the work is done
        file.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=file.parent).close()
    cuda.prepare(chosen)  # before the table is opened, which holds for the library's kernels
    store.open_table(chosen, need_file=False)
    start = time.monotonic()
    with store.alone(chosen, patience=2 * seconds):
        pairs = {cell: routes(chosen.type, cell.direction) for cell in plan.cells(chosen.type)}
        # What failed on a larger call is tried there again: nothing else would take that back.
        failed = [bucket for bucket, found in store.table(chosen).failures.items() if found]
        buckets = list(dict.fromkeys([*failed, *plan.buckets(chosen.type)]))
        found, left = examine(chosen, pairs, buckets, seconds, progress)
        file = store.add(chosen, found, file, decide_again=True)
    return Report(found, file, time.monotonic() - start, left)


def examine(
    place: torch.device,
    pairs: Mapping[Cell, Sequence[str]],
    buckets: Sequence[Bucket],
    budget: float,
    progress: Progress = lambda line: None,
) -> tuple[Table, int]:
    """Verdicts on routes in cells, then times of buckets, as a table; and how many of both the budget did not reach.

    Raises:
        ChildError: no child process can be started.
    """
    start = time.monotonic()
    kind = machine.kind(place)
    watch = Supervisor(
        place,
        _is_interpreted(place),
        PATIENCE.get(kind, GPU_PATIENCE),
        start + budget * (1 - TIMING_SHARE if buckets else 1),
        torch.get_num_threads(),
    )
    found = Table(identity(place))
    groups = [[_check(cell, route) for route in names] for cell, names in pairs.items() if names]
    total = sum(map(len, groups))
    done = 0

    def note(outcome: Outcome) -> None:
        nonlocal done
        done += 1
        _note_verdict(found, outcome)
        progress(f"{done} of {total} checks, {time.monotonic() - start:.0f} s")

    with closing(watch):
        watch.run(groups, _workers(place, len(groups)), note)
        watch.deadline = start + budget
        known = Table(found.identity)  # a route may have been checked in another process
        for table in (store.table(place), found):
            known.update(table)
        timed = [[task] for bucket in buckets if (task := _time(known, bucket, place)) is not None]
        measured = 0

        def note_times(outcome: Outcome) -> None:
            nonlocal measured
            measured += 1
            _note_times(found, outcome)
            progress(f"{measured} of {len(timed)} timings, {time.monotonic() - start:.0f} s")

        with suppress(ChildError):  # what was checked before counts
            watch.run(timed, 1, note_times)
    return found, total - done + len(timed) - measured


def _device(place: torch.device | str | None) -> torch.device:
    if place is None:
        return machine.default()
    try:
        chosen = torch.device(place)
    except (RuntimeError, TypeError) as error:
        raise fail("device", repr(place), "'cpu', 'cuda:1' or so") from error
    if not machine.is_here(chosen):
        raise fail("device", repr(str(chosen)), f"a device that torch finds here, as {str(machine.default())!r}")
    return torch.device(chosen.type, machine.index(chosen)) if machine.kind(chosen) in machine.GPUS else chosen


def _workers(place: torch.device, groups: int) -> int:
    room = MOST_WORKERS
    for free in (machine.free_memory(place), processor.free_memory()):
        room = room if free is None else min(room, free // MEMORY_OF_A_WORKER)
    cores = processor.cores() - (machine.kind(place) != "cpu")  # one is left to what drives the GPU
    # A child takes seconds to start: on a processor few checks are not worth many; on a GPU each compiles for seconds.
    wanted = groups // 8 + 1 if machine.kind(place) == "cpu" else groups
    return max(1, min(room, cores, wanted))


def _check(cell: Cell, route: str) -> Task:
    return Task({"check": str(cell), "route": route}, (route,))


def _note_verdict(found: Table, outcome: Outcome) -> None:
    cell, route = Cell.parse(outcome.task.message["check"]), outcome.task.routes[0]
    answer = outcome.answer or {}
    if "verdict" in answer:
        found.add(cell, route, replace(Verdict(**answer["verdict"]), date=_today()))
    # Out of memory, or killed by the system or a user, is no verdict: another time it may do.
    elif outcome.end in ("crashed", "hung"):
        result: Result = "hung" if outcome.end == "hung" else "crashed"
        found.add(cell, route, Verdict(result, None, outcome.detail, _today()))


def _time(known: Table, bucket: Bucket, place: torch.device) -> Task | None:
    """The task that times a bucket; None where there is nothing to compare the reference with."""
    names = _routes_to_time(known, bucket, place)
    if not names:
        return None
    names.append("reference")
    return Task({"time": str(bucket), "routes": names}, tuple(names))


def is_timed(known: Table, bucket: Bucket, place: torch.device) -> bool:
    """Whether every route that may be timed in a bucket was, or failed there."""
    done = {*known.times.get(bucket, {}), *known.failures.get(bucket, {})}
    return done >= {*_routes_to_time(known, bucket, place), "reference"}


def _routes_to_time(known: Table, bucket: Bucket, place: torch.device) -> list[str]:
    """Routes that are right somewhere and never ended a child; interpreted ones would take seconds and say nothing."""
    return [
        route
        for route in routes(place.type, bucket.direction)
        if _may_be_timed(known, route, bucket.dtype, bucket.direction)
        and not (_is_interpreted(place) and backend_of(route) == "triton")
    ]


def _is_interpreted(place: torch.device) -> bool:
    return place.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"


def _may_be_timed(known: Table, route: str, dtype: str, direction: str) -> bool:
    results = {
        verdicts[route].result
        for cell, verdicts in known.verdicts.items()
        if cell.dtype == dtype and cell.direction == direction and route in verdicts
    }
    return "right" in results and not results & {"crashed", "hung"}


def _note_times(found: Table, outcome: Outcome) -> None:
    bucket = Bucket.parse(outcome.task.message["time"])
    answer = outcome.answer or {}
    if answer.get("times"):
        found.times[bucket] = dict(answer["times"])
    bad: dict[str, tuple[Result, str]] = dict(answer.get("bad", {}))
    if outcome.end in ("crashed", "hung") and outcome.blamed not in ("", "reference"):
        bad[outcome.blamed] = ("hung" if outcome.end == "hung" else "crashed", outcome.detail)
    for route, (result, told) in bad.items():
        verdict = Verdict(result, None, f"while timed on {bucket}: {told}", _today())
        found.failures.setdefault(bucket, {})[route] = verdict


def _today() -> str:
    return datetime.now(timezone.utc).date().isoformat()
