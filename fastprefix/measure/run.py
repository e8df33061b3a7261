"""Turn a peer, a problem and a mode into something to call, check it, and time all that are left in turns."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastprefix.measure.check import disagreement
from fastprefix.measure.peers import OURS, Peer, peers_for
from fastprefix.measure.problem import TRAINED, Leaves, Mode, Problem
from fastprefix.measure.timing import Timing, captured, interleaved

Results = dict[str, Tensor]


class DeviceLostError(RuntimeError):
    """The device answers nothing any more in this process; ``who`` was running."""

    def __init__(self, who: str, reason: str) -> None:
        super().__init__(f"{who}: {reason}")
        self.who, self.reason = who, reason


def runner(peer: Peer, problem: Problem, mode: Mode, leaves: Leaves | None = None) -> Callable[[], Results]:
    """One call of the peer: ``{"o": ...}``, and the gradients that the mode asks for, ``dq`` to ``dprefix_v``.

    Args:
        leaves: to share them between peers; random ones without.
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
    """What became of each peer of a problem: a timing, or in words why there is none."""

    problem: Problem
    mode: Mode
    timings: dict[str, Timing] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)  # whose result disagreed; in `failures` too


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
    """Check that all peers agree, then time those that do in turns.

    Args:
        only: names of the peers to take; all without.
        skip: peers to leave out, and why.
        graphs: time CUDA graphs of the calls instead of the calls.
        before: told a peer's name before the device runs it for the first time.

    Returns:
        :class:`Measured`. A peer that is not available, fails, runs out of memory or disagrees is a failure
        in it, never an exception.

    Raises:
        DeviceLostError: a peer left the device unusable for this process.
    """
    found = Measured(problem, mode, failures=dict(skip or {}))
    leaves = Leaves.of(problem, mode)
    ready: dict[str, Callable[[], Any]] = {}
    want: Results | None = None
    # Ours go last, so that it is ours that is called wrong when it differs from everybody's.
    for peer in sorted(peers_for(problem, mode), key=lambda p: p.name.startswith(OURS)):
        if peer.name in found.failures or (only is not None and peer.name not in only):
            continue
        if reason := peer.unavailable(problem, mode):
            found.failures[peer.name] = reason
            continue
        before(peer.name)
        try:
            call = runner(peer, problem, mode, leaves)
            got = call()
            synchronize(problem.device)
            if peer.exact:
                want = want or got
                if difference := disagreement(got, want, problem.dtype):
                    found.wrong.append(peer.name)
                    found.failures[peer.name] = f"wrong: {difference}"
                    continue
            ready[peer.name] = captured(call) if graphs else call
        except Exception as error:
            found.failures[peer.name] = why(error)
        recover(problem.device, peer.name, found.failures.get(peer.name))
    if ready:
        try:
            found.timings = interleaved(ready, repeats, warmup, problem.device)
        except Exception as error:
            found.failures.update({name: f"while timing: {why(error)}" for name in ready})
        recover(problem.device, "timing", "; ".join(found.failures.values()))
    return found


def why(error: BaseException) -> str:
    """An exception as one short line."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def synchronize(device: torch.device | str) -> None:
    """Wait until the device has done all it was given, and raise what went wrong there."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def recover(device: torch.device | str, who: str, failure: str | None) -> None:
    """After a failure, give cached memory back and see whether the device still answers.

    Raises:
        DeviceLostError: it does not.
    """
    if failure is None or torch.device(device).type != "cuda":
        return
    try:
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
    except Exception as error:
        raise DeviceLostError(who, failure or why(error)) from error
