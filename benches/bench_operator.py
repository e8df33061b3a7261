"""The operator against its baselines, a group for each problem: forward, forward and backward, decoding, banks.

A result is checked before it is timed: ours against the reference in fp64 on a smaller problem of the same kind, a
baseline against ours on the problem itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor

from benches.device_suite.operator_calls import Call
from fastprefix.measure import Candidate, Leaves, Mode, Problem, candidates_for, runner
from fastprefix.measure.operator.candidates import OURS
from fastprefix.measure.operator.correctness import broken_rule, disagreement, results

PROBLEMS: tuple[tuple[Problem, Mode], ...] = (
    (Problem.train(8, 12, 12, 128, 16, 64), "forward"),
    (Problem.train(8, 12, 12, 128, 512, 64), "forward"),
    (Problem.train(8, 12, 12, 128, 16, 64), "backward"),
    (Problem.train(8, 12, 12, 128, 512, 64), "backward"),
    (Problem.train(8, 9, 3, 128, 512, 64), "backward"),
    (Problem.train(8, 9, 3, 128, 512, 64), "lowest"),
    (Problem.decode(1, 9, 3, 16, 2048, 64), "decode"),
    (Problem.decode(32, 9, 3, 16, 2048, 64), "decode"),
)
CASES = [(problem, mode, peer) for problem, mode in PROBLEMS for peer in candidates_for(problem, mode)]


@cache
def _leaves(problem: Problem, mode: Mode) -> Leaves:
    return Leaves.of(problem, mode)


@cache
def _ours(problem: Problem, mode: Mode) -> dict[str, Tensor]:
    ours = next(peer for peer in candidates_for(problem, mode) if peer.name == OURS)
    small = replace(problem, B=min(problem.B, 2), P=min(problem.P, 128))
    leaves = Leaves.random(small, requires_grad=True)
    problem_with_it = broken_rule(small, leaves, results(leaves, causal=small.causal, backend="auto"))
    assert problem_with_it is None, problem_with_it
    return runner(ours, problem, mode, _leaves(problem, mode))()


@pytest.mark.parametrize(("problem", "mode", "peer"), CASES, ids=lambda x: getattr(x, "label", getattr(x, "name", x)))
def test_operator(
    problem: Problem, mode: Mode, peer: Candidate, time_it: Callable[[str, Callable[[], Any]], None]
) -> None:
    if reason := peer.unavailable(problem, mode):
        pytest.skip(reason)
    call = runner(peer, problem, mode, _leaves(problem, mode))
    wrong = disagreement(call(), _ours(problem, mode), problem.dtype) if peer.exact else None
    assert wrong is None, wrong
    time_it(f"{mode}: {problem.label}", call)


# A mixed batch, with another prefix for every sample, and one prefix that all samples share.
_MIXED = Problem.train(8, 9, 3, 64, 128, 64)
_LENGTHS = (16, 48, 80, 112, 144, 176, 208, 240)


def _bank(lengths: tuple[int, ...]) -> Call:
    options = {"prefix_ids": torch.arange(8), "prefix_lens": torch.tensor(lengths)}
    return Call(_MIXED, lambda x, g: options, bank=8, packed=True)


MIXED = {
    "one prefix": Call(_MIXED, lambda x, g: {}),
    "bank": Call(_MIXED, lambda x, g: {"prefix_ids": torch.arange(8)}, bank=8),
    "packed bank": _bank((128,) * 8),
    "packed bank of many lengths": _bank(_LENGTHS),
}


@pytest.mark.parametrize("name", MIXED)
def test_mixed_batch(name: str, time_it: Callable[[str, Callable[[], Any]], None]) -> None:
    leaves, options = MIXED[name].build()
    call = partial(results, leaves, causal=True, backend="auto", **options)
    wrong = broken_rule(_MIXED, leaves, call(), options)
    assert wrong is None, wrong
    time_it(f"mixed batch: {_MIXED.label}", call)
