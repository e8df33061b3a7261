"""Every backend on the device, by name: each dtype, eager and compiled, held to the rule against fp64 truth."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from fastprefix import prefix_attention
from fastprefix.measure import DTYPES, Leaves, Problem
from fastprefix.measure.check import broken_rule, results
from fastprefix.measure.peers import backend_reasons
from fastprefix.measure.run import why
from fastprefix.types import BackendName

# Odd on purpose: lengths that fill no tile, groups of 1, 3, 4 and 8, head dims from 32 to 256.
PROBLEMS = (
    Problem.train(3, 8, 2, 63, 17, 64),
    Problem.train(1, 4, 4, 128, 129, 128),
    Problem.train(2, 9, 3, 200, 7, 80),
    Problem.train(2, 8, 1, 130, 0, 32),
    Problem.train(1, 2, 2, 70, 33, 256),
    Problem.train(1, 4, 2, 1000, 16, 64),
    Problem.train(4, 4, 2, 1, 1, 64),
    Problem(B=2, H=8, H_kv=2, S=7, T=40, P=20, D=64),
    Problem(B=2, H=4, H_kv=4, S=33, T=47, P=16, D=64, causal=False),
    Problem.decode(5, 9, 3, 33, 129, 64),
    Problem.decode(1, 8, 2, 20, 300, 128),
)
SMOKE = (Problem.train(2, 6, 2, 33, 7, 32), Problem.decode(3, 4, 2, 9, 17, 16))


def check(backend: BackendName, dtype: str, compiled: bool, device: str, smoke: bool) -> dict[str, Any]:
    """One row: ``cases`` says ``ok``, ``cannot: ...``, ``wrong: ...`` or ``failed: ...`` of each problem.

    Compiled, one problem of training and one of decoding: every shape is a compilation.
    """
    problems = SMOKE if smoke else PROBLEMS
    if compiled:
        problems = (problems[0], problems[-1])
    cases = {}
    for problem in problems:
        place = replace(problem, dtype=DTYPES[dtype], device=device)
        label = place.label + ("" if problem.causal else " bidirectional")
        cases[label] = _verdict(backend, place, compiled)
    bad = sum(verdict.startswith(("wrong", "failed")) for verdict in cases.values())
    return {"backend": backend, "dtype": dtype, "compiled": compiled, "bad": bad, "cases": cases}


def _verdict(backend: BackendName, problem: Problem, compiled: bool) -> str:
    if reasons := backend_reasons(problem, backend):
        return "cannot: " + "; ".join(reasons)
    op: Any = None
    if compiled:
        torch.compiler.reset()
        op = torch.compile(prefix_attention, fullgraph=True, dynamic=False)
    try:
        leaves = Leaves.random(problem, requires_grad=True)
        got = results(leaves, causal=problem.causal, backend=backend, op=op)
        broken = broken_rule(problem, leaves, got)
    except Exception as error:
        return f"failed: {why(error)}"
    return f"wrong: {broken}" if broken else "ok"
