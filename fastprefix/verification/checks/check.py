"""One route on one cell: right by the error rule, the same bits twice, everything written and nothing overwritten."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from ...machine.device_errors import describe_error, is_out_of_memory, recover
from ...types import INPUTS, AttentionArgs, Needs
from ..cells import Cell
from ..routes import Candidate, candidate
from ..table import Verdict
from .calls import calls
from .error_rule import ALL, ALL_AND_BIAS, TINY, Results, eager, trained, truth, worst_error

# All; the prefix's alone, as in the lowest layer; what passes through a frozen prefix; projections of q, or of q and v,
# that are trained in the lowest layer.
NEEDS = (
    ALL,
    Needs(False, False, False, True, True),
    Needs(True, True, True, False, False),
    Needs(True, False, False, True, True),
    Needs(True, False, True, True, True),
)
# With a bias on the prefix: all, what the lowest layer trains, and the bias alone.
NEEDS_AND_BIAS = (
    ALL_AND_BIAS,
    Needs(False, False, False, True, True, prefix_bias=True),
    Needs(False, False, False, False, False, prefix_bias=True),
)
# Cells without one of the rarer arguments, which are checked with all of NEEDS; the others with the first two.
USUAL = {"causal", "padding", "prefix-dtype"}
TINY_FP64 = 1e-12


class Case(NamedTuple):
    """One call, its truth, and what eager computation in its dtype makes of it."""

    label: str
    args: AttentionArgs
    do: Tensor
    want: Results
    rounded: Results


def check(route: str, cell: Cell, place: torch.device, few: bool, beat: Callable[[str], None]) -> Verdict:
    """Judge a route.

    Args:
        few: only the smallest calls, for a backend that is interpreted.
        beat: called with the label of each call before it is made.

    Raises:
        DeviceLostError: the device does not respond in this process any more.
    """
    chosen = candidate(route)
    worst, where = 0.0, ""
    refusals: dict[str, None] = {}
    taken = 0
    for case in _cases(cell, place, few):
        beat(case.label)
        try:
            if reasons := chosen.module.unsupported(case.args, chosen.route):
                refusals.update(dict.fromkeys(reasons))
                continue
            taken += 1
            share, about = _judge(chosen, cell, case, beat)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            told = describe_error(error)
            recover(place, route, told)
            return Verdict("failed", None, f"{told} ({case.label})")
        if not share <= worst:
            worst, where = share, f"{about} ({case.label})"
    if not taken:
        return Verdict("refused", None, "; ".join(refusals))
    return Verdict("right" if worst <= 1 else "wrong", worst, where)


@functools.lru_cache(maxsize=2)  # the routes of a cell are judged one after the other
def _cases(cell: Cell, place: torch.device, few: bool) -> tuple[Case, ...]:
    found = []
    for label, args, do in calls(cell, place, few):
        asked = do if cell.direction == "backward" else None
        found.append(Case(label, args, do, truth(args, asked), eager(args, asked)))
    return tuple(found)


def _judge(chosen: Candidate, cell: Cell, case: Case, beat: Callable[[str], None]) -> tuple[float, str]:
    before = {name: getattr(case.args, name).clone() for name in INPUTS}
    if cell.direction == "backward":
        sets = NEEDS if set(cell.features) <= USUAL else NEEDS[:2]
        worst, about = _backward(chosen, case, sets if case.args.prefix_bias is None else NEEDS_AND_BIAS, beat)
    else:
        worst, about = _forward(chosen, case)
    for name, x in before.items():
        if not torch.equal(x, getattr(case.args, name)):
            return float("inf"), f"{name} was overwritten"
    return worst, about


def _forward(chosen: Candidate, case: Case) -> tuple[float, str]:
    with _poisoned(chosen, case.args):
        found, again = ({"o": o, "lse": lse} for o, lse in (chosen.module.fwd(case.args, chosen.route) for _ in "12"))
    return _error(case, found, again)


def _backward(chosen: Candidate, case: Case, sets: Sequence[Needs], beat: Callable[[str], None]) -> tuple[float, str]:
    # The forward may have been another backend's. Its errors are not the backward's, so o and lse are exact, rounded
    # once to the dtypes that every forward returns.
    o = case.want["o"].to(case.args.q.dtype)
    lse = case.want["lse"].to(torch.promote_types(o.dtype, torch.float32))
    worst, about = 0.0, ""
    for needs in sets:
        beat(case.label)
        with _poisoned(chosen, case.args):
            runs = [chosen.module.bwd(case.args, o, lse, case.do, needs, chosen.route) for _ in "12"]
        names = trained(case.args)
        found, again = ({f"d{n}": x for n in names if (x := getattr(run, n)) is not None} for run in runs)
        asked = {f"d{name}" for name in names if getattr(needs, name)}
        if found.keys() != asked:
            return float("inf"), f"gave {', '.join(sorted(found))} where {', '.join(sorted(asked))} were asked for"
        share, told = _error(case, found, again if _is_deterministic(chosen, case.args) else found)
        if not share <= worst:
            worst, about = share, told
    return worst, about


def _error(case: Case, found: Results, again: Results) -> tuple[float, str]:
    for name, x in found.items():
        if x.shape != case.want[name].shape:
            return float("inf"), f"{name}: shape {list(x.shape)} instead of {list(case.want[name].shape)}"
        if not torch.equal(_bits(x), _bits(again[name])):
            return float("inf"), f"{name}: other bits in a second run"
    return worst_error(found, case.want, case.rounded, TINY_FP64 if case.args.q.dtype == torch.float64 else TINY)


def _bits(x: Tensor) -> Tensor:
    """The numbers as integers, since nan is not equal to itself."""
    return x.reshape(-1).contiguous().view(torch.uint8)


def _is_deterministic(chosen: Candidate, args: AttentionArgs) -> bool:
    """Whether a backward promises the same bits: ours do, a GPU's vendor kernels only where they are asked for them."""
    return args.q.device.type == "cpu" or not chosen.module.__name__.endswith(".aten")


@contextmanager
def _poisoned(chosen: Candidate, args: AttentionArgs) -> Iterator[None]:
    """Uninitialised memory is nan inside the block, so that what a kernel forgets to write is seen."""
    if "cudnn" in (chosen.route or ""):  # it would refuse; freed memory is handed out again
        torch.full_like(args.q, float("nan"))
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
