"""Run one row of the plan and say what came of it, as plain data."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch

from benches.correctness import check
from benches.plan import Check, Job, Time, Train
from benches.suite import Suite
from fastprefix.measure import Peaks, Problem, Timing, cost, measure, measure_peaks
from fastprefix.measure.peers import OURS, backend_reasons, chosen_backend
from fastprefix.measure.run import recover, synchronize, why
from fastprefix.types import BACKENDS

NO_FLEX = "not compiled for this row: every shape is a compilation"
TOGETHER = "together"
ORACLE = "auto takes the reference on this device: an oracle, not timed"
REPEATS, STEP_REPEATS = 20, 8


def kind(job: Job) -> str:
    """The file that a row belongs to."""
    match job:
        case Check():
            return "correctness"
        case Time():
            return "operator"
        case Train():
            return "step"


def do(job: Job, suite: Suite, smoke: bool) -> dict[str, Any]:
    """The row of a job; ``bad`` counts what is wrong or failed of ours.

    Raises:
        DeviceLostError: the device answers no more in this process.
    """
    blamed = suite.blamed(job.key)
    match job:
        case Check():
            suite.begin(job.key, "")
            if blamed:
                cases = {"all": f"failed: {blamed['']}"}
                row = {"backend": job.backend, "dtype": job.dtype, "compiled": job.compiled, "bad": 1, "cases": cases}
            else:
                row = check(job.backend, job.dtype, job.compiled, suite.device, smoke)
                recover(suite.device, "", next((v for v in row["cases"].values() if v.startswith("failed")), None))
        case Time():
            row = _time(job, suite, blamed, 3 if smoke else REPEATS)
        case Train():
            row = _train(job, suite, blamed, 2 if smoke else STEP_REPEATS)
    gc.collect()
    if torch.device(suite.device).type == "cuda":
        torch.cuda.empty_cache()
    return {"key": job.key, **row}


def _time(job: Time, suite: Suite, blamed: dict[str, str], repeats: int) -> dict[str, Any]:
    skip = dict(blamed)
    if not job.flex:
        skip["flex"] = NO_FLEX
    if chosen_backend(job.problem) == "reference":
        skip[OURS] = ORACLE
    found = measure(
        job.problem, job.mode, repeats, skip=skip, graphs=job.graphs, before=lambda who: suite.begin(job.key, who)
    )
    ours = [name for name in found.failures if name.startswith(OURS) and (name not in skip or name in blamed)]
    least, peaks = cost(job.problem, job.mode), _peaks(suite.device, job.problem)
    return {
        "mode": job.mode,
        "graphs": job.graphs,
        "problem": _plain(job.problem),
        "bytes": least.bytes,
        "flops": least.flops,
        "floor_s": peaks.seconds(least),
        "bound": peaks.bound(least),
        "peers": {name: _times(timing) for name, timing in found.timings.items()},
        "failures": found.failures,
        "wrong": found.wrong,
        "bad": len(set(ours) | set(found.wrong)),
    }


def _train(job: Train, suite: Suite, blamed: dict[str, str], repeats: int) -> dict[str, Any]:
    from fastprefix.measure.candidate import Step
    from fastprefix.measure.models import random_llama
    from fastprefix.measure.step import FROZEN, PEFT, candidates, measure_steps

    shape: dict[str, Any] = {"device": suite.device}
    if not job.tiny:  # Llama-3.2-1B's
        shape.update(hidden=2048, layers=16, heads=32, kv_heads=8, ffn=8192, vocab=128256, dtype=torch.bfloat16)
    row: dict[str, Any] = {
        "model": {name: str(x) for name, x in shape.items()},
        "batch": job.batch,
        "tokens": job.tokens,
        "num_virtual_tokens": job.num_virtual_tokens,
        "steps": {},
        "failures": dict(blamed),
        "bad": 0,
    }
    torch.manual_seed(0)
    model = random_llama(**shape)
    ids = torch.randint(0, shape.get("vocab", 1024), (job.batch, job.tokens), device=suite.device)

    def attempt(who: str, names: list[str], work: Callable[[dict[str, Step]], Any]) -> Any:
        """``work`` on these candidates; None and a failure in the row where that fails."""
        suite.begin(job.key, who)
        result = None
        try:
            result = work(candidates(model, ids, job.num_virtual_tokens, names))
            synchronize(suite.device)
        except Exception as error:
            row["failures"][who] = why(error)
            row["bad"] += who.startswith((OURS, TOGETHER))
        recover(suite.device, who, row["failures"].get(who))
        return result

    # Each alone first: one that cannot must not take the others along.
    able = []
    for name in (*_our_names(shape, job, suite.device), PEFT, FROZEN):
        if name not in blamed and attempt(name, [name], lambda steps: [step() for step in steps.values()]):
            able.append(name)
    results = attempt(TOGETHER, able, lambda steps: measure_steps(steps, repeats)) if able else None
    for name, result in (results or {}).items():
        memory = {"saved_bytes": result.saved_bytes, "peak_bytes": result.peak_bytes}
        row["steps"][name] = {**_times(result.timing), **memory}
    return row


def _our_names(shape: dict[str, Any], job: Train, device: str) -> list[str]:
    heads, kv_heads, hidden = shape.get("heads", 8), shape.get("kv_heads", 2), shape.get("hidden", 256)
    sizes = (job.batch, heads, kv_heads, job.tokens, job.num_virtual_tokens, hidden // heads)
    problem = Problem.train(*sizes, dtype=shape.get("dtype", torch.float32), device=device)
    chosen = chosen_backend(problem)
    named = [b for b in BACKENDS if b not in (chosen, "reference") and not backend_reasons(problem, b)]
    return [*([] if chosen == "reference" else [OURS]), *(f"{OURS}:{name}" for name in named)]


def _times(timing: Timing) -> dict[str, float]:
    low, high = timing.quartiles
    return {"median_s": timing.median, "q1_s": low, "q3_s": high, "best_s": timing.best, "n": len(timing.samples)}


def _plain(problem: Problem) -> dict[str, Any]:
    sizes = {name: getattr(problem, name) for name in ("B", "H", "H_kv", "S", "T", "P", "D", "causal")}
    return {**sizes, "dtype": problem.dtype_name}


_measured: dict[torch.dtype, Peaks] = {}


def _peaks(device: str, problem: Problem) -> Peaks:
    if problem.dtype not in _measured:
        _measured[problem.dtype] = measure_peaks(device, problem.dtype)
    return _measured[problem.dtype]
