"""Verifies what a call or a model needs and no one has verified on the device, when it is first needed."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch

from ..machine import device
from ..types import AttentionArgs
from . import plan, store
from .cells import Cell, direction_of
from .lookup import verdict
from .routes import candidate, routes
from .run import examine, is_timed
from .store import Policy
from .table import Bucket

BUDGET = 90.0  # seconds for one call or one model; few need a tenth of it

# What was tried in this process: a check that found no time or no memory is not tried again at every call.
_tried: set[tuple[torch.device, Cell]] = set()
_hopeless: set[torch.device] = set()  # devices whose child processes could not start
_told: set[torch.device] = set()


class _Held(threading.local):
    """How many blocks of :func:`held` this thread is in, and how many of these are quiet."""

    depth = quiet = 0


_held = _Held()


def verify_call(args: AttentionArgs, mode: str) -> bool:
    """Verify what a call on a GPU needs, where this is a moment for it.

    Returns:
        False where something is missing and this is no moment: a graph is captured or traced, or a backward runs.
    """
    place = args.q.device
    if device.kind(place) not in device.GPUS or store.policy() is not Policy.FIRST_USE:
        return True
    missing = _missing(place, plan.cells_of_call(args, direction_of(args)))
    if not missing or not _somebody_can(args):
        return True
    if mode in ("backward", "lowest") or not is_a_moment(place):
        if not _held.quiet:
            _say_once(place)
        return False
    _verify(place, missing, plan.buckets_of_calls([args], place.type), "this call")
    return True


def verify_model(calls: Sequence[AttentionArgs]) -> None:
    """Verify what a model needs whose layers make these calls, on their devices; known things are not done again."""
    if store.policy() is not Policy.FIRST_USE:
        return
    for place in dict.fromkeys(args.q.device for args in calls):
        own = [args for args in calls if args.q.device == place and _somebody_can(args)]
        missing = _missing(place, plan.cells_of_model(own))
        if missing and is_a_moment(place):
            _verify(place, missing, plan.buckets_of_calls(own, place.type), "this model")


def _somebody_can(args: AttentionArgs) -> bool:
    """Whether some backend but the reference takes a call; asked before a child process is started to say so."""
    if device.kind(args.q.device) == "cpu":  # vendor kernels take nearly all, and to ask Triton imports it
        return True
    names = routes(args.q.device.type, direction_of(args))
    return any(not chosen.module.unsupported(args, chosen.route) for chosen in map(candidate, names))


def _say_once(place: torch.device) -> None:
    if place not in _told:
        _told.add(place)
        name = store.table(place).identity["device"]
        store.tell(
            f"nothing is proved on {name} for a call that runs in a backward, or in a forward that is captured, traced"
            " or compiled: the reference takes it. Run `fastprefix verify`, or a plain forward, before"
        )


def is_a_moment(place: torch.device) -> bool:
    """Whether a call may be kept waiting: no graph is captured, nothing traced or compiled, no backward runs."""
    if _held.depth or torch.compiler.is_compiling() or torch._C._current_graph_task_id() != -1:
        return False
    return not device.is_capturing(place)


def is_held() -> bool:
    """Whether this thread is in a block of :func:`held`."""
    return _held.depth > 0


def is_traced() -> bool:
    """Whether torch traces what runs, or some mode looks at it; it does not say so inside of an operator."""
    return not torch.compiler.is_compiling() and (torch.jit.is_tracing() or torch._C._len_torch_dispatch_stack() > 0)


@contextmanager
def held(quiet: bool = False) -> Iterator[None]:
    """Verify nothing inside the block; ``quiet`` where no line need say so, as it is verified after it."""
    _held.depth += 1
    _held.quiet += quiet
    try:
        yield
    finally:
        _held.depth -= 1
        _held.quiet -= quiet


def _missing(place: torch.device, cells: Iterable[Cell]) -> dict[Cell, list[str]]:
    """Cells, and the routes in them of which nothing is known, and which this process has not tried."""
    if place in _hopeless:
        return {}
    table = store.table(place)
    found = {}
    for cell in cells:
        names = [name for name in routes(place.type, cell.direction) if verdict(table, cell, name) is None]
        if names and (place, cell) not in _tried:
            found[cell] = names
    return found


def _verify(place: torch.device, cells: Iterable[Cell], buckets: Sequence[Bucket], what: str) -> None:
    start = time.monotonic()
    cells = list(cells)
    try:
        with store.alone(place, patience=3 * BUDGET):
            store.reload(place)  # another process may have done it meanwhile
            missing = _missing(place, cells)
            if not missing:
                return
            table = store.table(place)
            name = table.identity["device"]
            store.say(f"fastprefix: checking which backends are right and fast on {name} for {what}, once ...")
            found, _ = examine(place, missing, [x for x in buckets if not is_timed(table, x, place)], BUDGET)
            _tried.update((place, cell) for cell in missing)
            store.say(f" {time.monotonic() - start:.1f} s\n")
            store.add(place, found)
    except Exception as error:  # whatever it is, it must not become the caller's
        _hopeless.add(place)
        store.say(f" impossible: {error}; what is not proved is not used\n")
