"""Run one row of the plan and return its result as plain data."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterable
from typing import Any

import torch

from benches.device_suite import model_correctness, operator_correctness, training_rows
from benches.device_suite.operator_correctness import Case, verdict
from benches.device_suite.plan import Job, ModelCheck, OperatorCheck, OperatorTiming, TrainingTiming
from benches.device_suite.suite_state import SuiteState
from benches.device_suite.training_rows import timing_row
from fastprefix.machine.device_errors import DeviceLostError, describe_error, recover
from fastprefix.measure import Peaks, Problem, candidates_for, cost, measure, measure_peaks
from fastprefix.measure.operator.baselines import NO_PREFIX
from fastprefix.measure.operator.candidates import OURS, chosen_backend

NO_FLEX = "not compiled for this row: every shape is a compilation"
NO_MASK = "not timed in this row: its dense mask takes longer than all others together"
DENSE = ("cat_mask", "cat_cudnn")
REPEATS, LONG_REPEATS, STEP_REPEATS = 20, 5, 8


def run_job(job: Job, suite: SuiteState, smoke: bool) -> dict[str, Any]:
    """The result of a row: ``bad`` counts wrong or failed results of ours, ``wall_s`` is the time of the whole row.

    Raises:
        DeviceLostError: the device does not respond in this process any more.
    """
    start = time.monotonic()
    if not isinstance(job, ModelCheck):
        model_correctness.release()
    match job:
        case OperatorCheck(what, backend, dtype, compiled):
            cases = operator_correctness.cases(what, backend, dtype, compiled, suite.device, smoke)
            row = {"what": what, "backend": backend, "dtype": dtype, "compiled": compiled, **_judge(job, suite, cases)}
        case ModelCheck(model, backend, dtype):
            cases = model_correctness.cases(model, backend, dtype, suite.device, smoke)
            row = {"what": model, "backend": backend, "dtype": dtype, "compiled": False, **_judge(job, suite, cases)}
        case OperatorTiming():
            row = _time(job, suite, 3 if smoke else LONG_REPEATS if job.long else REPEATS)
        case TrainingTiming():
            peaks = _peaks(suite.device, training_rows.layer_problem(job, suite.device).dtype)
            repeats = 2 if smoke else STEP_REPEATS
            row = training_rows.training_row(
                job, suite.device, suite.blamed(job.key), repeats, peaks, lambda who: suite.begin(job.key, who)
            )
    gc.collect()
    if torch.device(suite.device).type == "cuda":
        torch.cuda.empty_cache()
    return {"key": job.key, **row, "wall_s": time.monotonic() - start}


def _judge(job: Job, suite: SuiteState, cases: Iterable[Case]) -> dict[str, Any]:
    """The outcome of each check; checks that lost the device before are not run again."""
    found, blamed = {}, suite.blamed(job.key)
    for label, judge in cases:
        if label in blamed:
            found[label] = f"failed: {blamed[label]}"
            continue
        suite.begin(job.key, label)
        found[label] = verdict(judge)
        recover(suite.device, label, found[label] if found[label].startswith("failed") else None)
    return {"bad": sum(v.startswith(("wrong", "failed")) for v in found.values()), "cases": found}


def _time(job: OperatorTiming, suite: SuiteState, repeats: int) -> dict[str, Any]:
    problem, mode, blamed = job.problem, job.mode, suite.blamed(job.key)
    least, bare, peaks = cost(problem, mode), cost(problem.without_prefix(), mode), _peaks(suite.device, problem.dtype)
    auto = chosen_backend(problem, mode)
    row: dict[str, Any] = {
        "mode": mode,
        "graphs": job.graphs,
        "problem": problem_row(problem),
        "auto": auto,
        "bytes": least.bytes,
        "flops": least.flops,
        "floor_s": peaks.seconds(least),
        "bound": peaks.bound(least),
    }
    skip = {x.name: reason for x in candidates_for(problem, mode) if (reason := x.unavailable(problem, mode))}
    if not job.flex:
        skip["flex"] = NO_FLEX
    if job.long:
        skip.update(dict.fromkeys(DENSE, NO_MASK))
    if auto == "reference":
        skip[OURS] = training_rows.ORACLE
    skip.update(blamed)
    try:
        found = measure(
            problem, mode, repeats, skip=skip, graphs=job.graphs, before=lambda who: suite.begin(job.key, who)
        )
    except Exception as error:  # no single candidate's fault: the inputs do not fit in memory
        if isinstance(error, DeviceLostError):
            raise
        return {**row, "peers": {}, "failures": {"everybody": describe_error(error)}, "wrong": [], "bad": 1}
    ours = [name for name in found.failures if name.startswith(OURS) and (name not in skip or name in blamed)]
    peers = {name: timing_row(t, bare if name == NO_PREFIX else least) for name, t in found.timings.items()}
    bad = len(set(ours) | set(found.wrong))
    return {**row, "peers": peers, "failures": found.failures, "wrong": found.wrong, "bad": bad}


def problem_row(problem: Problem) -> dict[str, Any]:
    """The sizes and the dtype of a problem as plain data."""
    sizes = {name: getattr(problem, name) for name in ("B", "H", "H_kv", "S", "T", "P", "D", "causal")}
    return {**sizes, "dtype": problem.dtype_name}


_measured: dict[torch.dtype, Peaks] = {}


def _peaks(device: str, dtype: torch.dtype) -> Peaks:
    if dtype not in _measured:
        _measured[dtype] = measure_peaks(device, dtype)
    return _measured[dtype]
