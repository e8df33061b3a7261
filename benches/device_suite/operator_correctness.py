"""Checks of each backend, in every dtype, eager and compiled, with every argument, by the error rule."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from benches.device_suite.operator_calls import CALLS, Call
from fastprefix import prefix_attention
from fastprefix.dispatch import UnsupportedError
from fastprefix.machine.device_errors import describe_error
from fastprefix.measure import DTYPES, Problem
from fastprefix.measure.operator.correctness import broken_rule, results
from fastprefix.types import BackendName

# One check: its label, and a function that returns what is wrong, in words; None when nothing is.
Case = tuple[str, Callable[[], "str | None"]]

# Odd on purpose: lengths that fill no tile, groups of 1, 3, 4 and 8, head dims from 32 to 256. The last four are
# checked in fp32 as well, where Triton's kernels take head dims up to 64; the first and the last are checked compiled,
# which costs a compilation for every shape.
PROBLEMS = (
    Problem.train(2, 32, 8, 513, 128, 128),
    Problem.train(3, 12, 12, 257, 17, 64),
    Problem.train(2, 9, 3, 200, 7, 80),
    Problem.train(2, 8, 1, 130, 0, 32),
    Problem.train(1, 2, 2, 170, 33, 256),
    Problem.train(1, 8, 2, 300, 2048, 64),
    Problem(B=2, H=8, H_kv=2, S=133, T=257, P=16, D=64, causal=False),
    Problem.decode(64, 8, 2, 100, 2048, 128),
    Problem.decode(5, 9, 3, 33, 129, 64),
    Problem.train(1, 4, 2, 1000, 16, 64),
    Problem.train(1, 4, 4, 129, 129, 64),
    Problem(B=2, H=8, H_kv=2, S=70, T=400, P=20, D=64),
    Problem.decode(1, 32, 8, 900, 1300, 64),
)
SMOKE = (Problem.train(2, 2, 1, 13, 7, 16), Problem.decode(3, 4, 2, 9, 17, 16))


def problems(dtype: str, compiled: bool, smoke: bool) -> tuple[Problem, ...]:
    """The problems of a row."""
    if smoke:
        return SMOKE[:1] if compiled else SMOKE
    chosen = PROBLEMS[-4:] if dtype == "fp32" else PROBLEMS
    return (chosen[0], chosen[-1]) if compiled else chosen


def calls(what: str, dtype: str, compiled: bool, device: str, smoke: bool) -> Iterator[tuple[str, Call]]:
    """The calls of a row with their labels."""
    if what == "shapes":
        named = {label(x): Call(x, lambda problem, generator: {}) for x in problems(dtype, compiled, smoke)}
    else:
        named = {name: call.small() if smoke else call for name, call in CALLS.items()}
    for name, call in named.items():
        yield name, replace(call, problem=replace(call.problem, dtype=DTYPES[dtype], device=device))


def label(problem: Problem) -> str:
    """The problem's label without the dtype, which its row names."""
    return problem.label.rpartition(" ")[0] + ("" if problem.causal else " bidirectional")


def cases(what: str, backend: BackendName, dtype: str, compiled: bool, device: str, smoke: bool) -> Iterator[Case]:
    """The checks of a row."""
    for name, call in calls(what, dtype, compiled, device, smoke):
        yield name, functools.partial(_broken, backend, call, compiled)


def _broken(backend: BackendName, call: Call, compiled: bool) -> str | None:
    op: Any = None
    if compiled:
        torch.compiler.reset()
        op = torch.compile(prefix_attention, fullgraph=True, dynamic=False)
    leaves, options = call.build()
    got = results(leaves, backend=backend, op=op, causal=call.problem.causal, **options)
    return broken_rule(call.problem, leaves, got, options)


def verdict(judge: Callable[[], str | None]) -> str:
    """Run a check: ``ok``, ``cannot: ...`` (unsupported, or not installed), ``wrong: ...`` or ``failed: ...``."""
    try:
        wrong = judge()
    except ModuleNotFoundError as error:
        ours = str(error.name).startswith(("fastprefix", "benches"))
        return f"failed: {describe_error(error)}" if ours else f"cannot: {error}"
    except UnsupportedError as error:
        _, *reasons = str(error).splitlines()
        return "cannot: " + "; ".join(reason.strip() for reason in reasons)
    except Exception as error:
        return f"failed: {describe_error(error)}"
    return f"wrong: {wrong}" if wrong else "ok"
