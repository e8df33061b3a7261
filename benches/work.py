"""Run one row of the plan and say what came of it, as plain data."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterable
from typing import Any

import torch

from benches import correctness, equality, step
from benches.correctness import Case, verdict
from benches.plan import Check, Equal, Job, Time, Train
from benches.rows import median, plain
from benches.suite import Suite
from fastprefix.measure import Peaks, candidates_for, cost, measure, measure_peaks
from fastprefix.measure.device_errors import DeviceLostError, describe_error, recover
from fastprefix.measure.operator.baselines import NO_PREFIX
from fastprefix.measure.operator.candidates import OURS, chosen_backend

NO_FLEX = "not compiled for this row: every shape is a compilation"
REPEATS, STEP_REPEATS = 20, 8


def do(job: Job, suite: Suite, smoke: bool) -> dict[str, Any]:
    """The row of a job; ``bad`` counts what is wrong or failed of ours, ``wall_s`` is what the row took in all.

    Raises:
        DeviceLostError: the device answers no more in this process.
    """
    start = time.monotonic()
    if not isinstance(job, Equal):
        equality.release()
    match job:
        case Check(what, backend, dtype, compiled):
            cases = correctness.cases(what, backend, dtype, compiled, suite.device, smoke)
            row = {"what": what, "backend": backend, "dtype": dtype, "compiled": compiled, **_judge(job, suite, cases)}
        case Equal(model, backend, dtype):
            cases = equality.cases(model, backend, dtype, suite.device, smoke)
            row = {"what": model, "backend": backend, "dtype": dtype, "compiled": False, **_judge(job, suite, cases)}
        case Time():
            row = _time(job, suite, 3 if smoke else REPEATS)
        case Train():
            peaks = _peaks(suite.device, step.problem(job, suite.device).dtype)
            repeats = 2 if smoke else STEP_REPEATS
            row = step.train(
                job, suite.device, suite.blamed(job.key), repeats, peaks, lambda who: suite.begin(job.key, who)
            )
    gc.collect()
    if torch.device(suite.device).type == "cuda":
        torch.cuda.empty_cache()
    return {"key": job.key, **row, "wall_s": time.monotonic() - start}


def _judge(job: Job, suite: Suite, cases: Iterable[Case]) -> dict[str, Any]:
    """The verdict on each case; what lost the device before is not tried again."""
    found, blamed = {}, suite.blamed(job.key)
    for label, judge in cases:
        if label in blamed:
            found[label] = f"failed: {blamed[label]}"
            continue
        suite.begin(job.key, label)
        found[label] = verdict(judge)
        recover(suite.device, label, found[label] if found[label].startswith("failed") else None)
    return {"bad": sum(v.startswith(("wrong", "failed")) for v in found.values()), "cases": found}


def _time(job: Time, suite: Suite, repeats: int) -> dict[str, Any]:
    problem, mode, blamed = job.problem, job.mode, suite.blamed(job.key)
    least, bare, peaks = cost(problem, mode), cost(problem.without_prefix(), mode), _peaks(suite.device, problem.dtype)
    auto = chosen_backend(problem)
    row: dict[str, Any] = {
        "mode": mode,
        "graphs": job.graphs,
        "problem": plain(problem),
        "auto": auto,
        "bytes": least.bytes,
        "flops": least.flops,
        "floor_s": peaks.seconds(least),
        "bound": peaks.bound(least),
    }
    skip = {x.name: reason for x in candidates_for(problem, mode) if (reason := x.unavailable(problem, mode))}
    if not job.flex:
        skip["flex"] = NO_FLEX
    if auto == "reference":
        skip[OURS] = step.ORACLE
    skip.update(blamed)
    try:
        found = measure(
            problem, mode, repeats, skip=skip, graphs=job.graphs, before=lambda who: suite.begin(job.key, who)
        )
    except Exception as error:  # nobody's own: random leaves that do not fit
        if isinstance(error, DeviceLostError):
            raise
        return {**row, "peers": {}, "failures": {"everybody": describe_error(error)}, "wrong": [], "bad": 1}
    ours = [name for name in found.failures if name.startswith(OURS) and (name not in skip or name in blamed)]
    peers = {name: median(t, bare if name == NO_PREFIX else least) for name, t in found.timings.items()}
    bad = len(set(ours) | set(found.wrong))
    return {**row, "peers": peers, "failures": found.failures, "wrong": found.wrong, "bad": bad}


_measured: dict[torch.dtype, Peaks] = {}


def _peaks(device: str, dtype: torch.dtype) -> Peaks:
    if dtype not in _measured:
        _measured[dtype] = measure_peaks(device, dtype)
    return _measured[dtype]
