"""Run the candidates of a problem: compare their results, then time in turns those that agree."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastprefix.machine.device_errors import describe_error, recover, synchronize
from fastprefix.machine.timing import Timing, captured, interleaved
from fastprefix.measure.operator.candidates import OURS, Candidate, candidates_for
from fastprefix.measure.operator.correctness import disagreement
from fastprefix.measure.operator.problem import TRAINED, Leaves, Mode, Problem

Results = dict[str, Tensor]


def runner(peer: Candidate, problem: Problem, mode: Mode, leaves: Leaves | None = None) -> Callable[[], Results]:
    """A function that calls the candidate once.

    It returns ``{"o": ...}`` and the gradients that the mode asks for, ``dq`` to ``dprefix_v``.

    Args:
        peer: the candidate.
        leaves: inputs that several candidates share; random ones without.
    """
    if leaves is None:
        leaves = Leaves.of(problem, mode)
    attend, do = peer.prepare(problem, leaves), leaves.do
    inputs = {name: leaves.inputs[name] for name in TRAINED[mode]}
    if not inputs:

        @torch.no_grad()
        def forward() -> Results:
            return {"o": attend()}

        return forward

    def both() -> Results:
        o = attend()
        if not o.requires_grad:  # no prefix, and nothing else is trained
            return {"o": o}
        grads = torch.autograd.grad(o, list(inputs.values()), do, allow_unused=True)
        named = zip(inputs, grads, strict=True)
        return {"o": o.detach(), **{f"d{name}": grad for name, grad in named if grad is not None}}

    return both


@dataclass
class Measured:
    """Each candidate's timing, or in words why it has none."""

    problem: Problem
    mode: Mode
    timings: dict[str, Timing] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)  # candidates whose result disagreed; they are in `failures` too


def measure(
    problem: Problem,
    mode: Mode,
    repeats: int = 10,
    warmup: int = 2,
    only: Collection[str] | None = None,
    skip: Mapping[str, str] | None = None,
    graphs: bool = False,
    before: Callable[[str], None] = lambda name: None,
) -> Measured:
    """Check that all candidates agree, then time in turns those that do.

    Args:
        only: names of the candidates to take; all without.
        skip: candidates to leave out, and why.
        graphs: time CUDA graphs of the calls instead of the calls.
        before: called with a candidate's name before the device runs it for the first time.

    Returns:
        :class:`Measured`. A candidate that is not available, fails, runs out of memory or disagrees is a failure in it,
        never an exception.

    Raises:
        DeviceLostError: a candidate left the device unusable for this process.
    """
    found = Measured(problem, mode, failures=dict(skip or {}))
    leaves = Leaves.of(problem, mode)
    ready: dict[str, Callable[[], Any]] = {}
    want: Results | None = None
    # Ours go last: where ours differs from all the others, ours is the one that is reported as wrong.
    for candidate in sorted(candidates_for(problem, mode), key=lambda p: p.name.startswith(OURS)):
        if candidate.name in found.failures or (only is not None and candidate.name not in only):
            continue
        if reason := candidate.unavailable(problem, mode):
            found.failures[candidate.name] = reason
            continue
        before(candidate.name)
        try:
            call = runner(candidate, problem, mode, leaves)
            got = call()
            synchronize(problem.device)
            if candidate.exact:
                want = want or got
                if difference := disagreement(got, want, problem.dtype):
                    found.wrong.append(candidate.name)
                    found.failures[candidate.name] = f"wrong: {difference}"
                    continue
            ready[candidate.name] = captured(call) if graphs else call
        except Exception as error:
            found.failures[candidate.name] = describe_error(error)
        recover(problem.device, candidate.name, found.failures.get(candidate.name))
    if ready:
        try:
            found.timings = interleaved(ready, repeats, warmup, problem.device)
        except Exception as error:
            found.failures.update({name: f"while timing: {describe_error(error)}" for name in ready})
        recover(problem.device, "timing", "; ".join(found.failures.values()))
    return found
