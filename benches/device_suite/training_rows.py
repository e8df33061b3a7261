"""A row of whole training steps: ours with every backend, concatenation, PEFT's and the frozen model's."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from benches.device_suite.plan import TrainingTiming
from fastprefix.machine.device_errors import describe_error, recover, synchronize
from fastprefix.measure import Cost, Peaks, Problem, Timing
from fastprefix.measure.operator.candidates import INTERPRETED, OURS, backend_reasons, chosen_backend, example_args
from fastprefix.types import BACKENDS
from fastprefix.verification.routes import module, no_backward

if TYPE_CHECKING:
    from fastprefix.measure.training.training_step import TrainingStep

TOGETHER = "together"
ORACLE = "auto takes the reference on this device: an oracle, not timed"
# The sizes of random_llama's defaults, and of Llama-3.2-1B.
TINY_LLAMA: dict[str, Any] = {
    "hidden": 256,
    "layers": 4,
    "heads": 8,
    "kv_heads": 2,
    "vocab": 1024,
    "dtype": torch.float32,
}
LLAMA_1B: dict[str, Any] = {
    "hidden": 2048,
    "layers": 16,
    "heads": 32,
    "kv_heads": 8,
    "ffn": 8192,
    "vocab": 128256,
    "dtype": torch.bfloat16,
}


def layer_problem(job: TrainingTiming, device: str) -> Problem:
    """The operator call of one layer."""
    x = TINY_LLAMA if job.tiny else LLAMA_1B
    sizes = (job.batch, x["heads"], x["kv_heads"], job.tokens, job.num_virtual_tokens, x["hidden"] // x["heads"])
    return Problem.train(*sizes, dtype=x["dtype"], device=device)


def training_row(
    job: TrainingTiming, device: str, blamed: dict[str, str], repeats: int, peaks: Peaks, before: Callable[[str], None]
) -> dict[str, Any]:
    """Measure the steps and return the row.

    Args:
        blamed: the steps that must not run in this row again, and why.
        before: called with the name of the step that runs next.

    Raises:
        DeviceLostError: the device does not respond in this process any more.
    """
    shape = TINY_LLAMA if job.tiny else LLAMA_1B
    ours, untimed = _ours(layer_problem(job, device))
    row: dict[str, Any] = {
        "model": {name: str(x) for name, x in shape.items()},
        "batch": job.batch,
        "tokens": job.tokens,
        "num_virtual_tokens": job.num_virtual_tokens,
        "steps": {},
        "failures": {**untimed, **blamed},
        "bad": sum(name.startswith((OURS, TOGETHER)) for name in blamed),
    }
    try:
        from fastprefix.measure.training.compare_steps import CAT, FROZEN, PEFT, build_steps, measure_steps, step_cost
        from fastprefix.measure.training.random_models import random_llama
    except ImportError as error:
        return {**row, "failures": {**row["failures"], "everybody": describe_error(error)}}
    torch.manual_seed(0)
    model = random_llama(**shape, device=device)
    ids = torch.randint(0, shape["vocab"], (job.batch, job.tokens), device=device)
    least = step_cost(model, layer_problem(job, device))
    row.update(floor_s=peaks.seconds(least), bound=peaks.bound(least))

    def attempt(who: str, names: list[str], work: Callable[[dict[str, TrainingStep]], Any]) -> Any:
        """Call ``work`` with these steps; on an error, note a failure in the row and return None."""
        before(who)
        result = None
        try:
            result = work(build_steps(model, ids, job.num_virtual_tokens, names))
            synchronize(device)
        except Exception as error:
            row["failures"][who] = describe_error(error)
            row["bad"] += who.startswith((OURS, TOGETHER))
        recover(device, who, row["failures"].get(who))
        return result

    # Each step runs alone first, so that one that fails does not end the others.
    able = []
    for name in (*ours, CAT, PEFT, FROZEN):
        if name not in blamed and attempt(name, [name], lambda steps: [step() for step in steps.values()]):
            able.append(name)
    # Here all steps get the same prefix, and building them raises if their losses differ.
    results = None
    if able and TOGETHER not in blamed:
        results = attempt(TOGETHER, able, lambda steps: measure_steps(steps, repeats))
    for name, result in (results or {}).items():
        memory = {"saved_bytes": result.saved_bytes, "peak_bytes": result.peak_bytes}
        own = least if name != FROZEN else step_cost(model, layer_problem(job, device).without_prefix())
        row["steps"][name] = {**timing_row(result.timing, own), **memory}
    return row


def timing_row(timing: Timing, least: Cost) -> dict[str, float]:
    """The times in seconds, and the bandwidth and arithmetic rate that the median time comes to for that cost."""
    low, high = timing.quartiles
    return {
        "median_s": timing.median,
        "q1_s": low,
        "q3_s": high,
        "best_s": timing.best,
        "n": len(timing.samples),
        "gb_s": least.bandwidth(timing.median),
        "tflop_s": least.rate(timing.median),
    }


def _ours(x: Problem) -> tuple[list[str], dict[str, str]]:
    """The names of our steps that can be timed on such a problem, and why the others cannot."""
    chosen = chosen_backend(x, "backward")
    named = {OURS: chosen, **{f"{OURS}:{name}": name for name in BACKENDS if name not in (chosen, "reference")}}
    untimed = {}
    for name, backend in named.items():
        if backend == "reference":
            untimed[name] = ORACLE
        elif reasons := backend_reasons(x, backend):
            untimed[name] = "; ".join(reasons)
        elif missing := no_backward(module(backend), example_args(x)):
            untimed[name] = "; ".join(missing)
        elif backend == "triton" and torch.device(x.device).type == "cpu":
            untimed[name] = INTERPRETED
    return [name for name in named if name not in untimed], untimed
