"""A row of whole training steps: ours by every backend, concatenation, PEFT's and the frozen model's."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from benches.plan import Train
from benches.rows import median
from fastprefix.measure import Peaks, Problem
from fastprefix.measure.device_errors import describe_error, recover, synchronize
from fastprefix.measure.operator.candidates import INTERPRETED, OURS, backend_reasons, chosen_backend
from fastprefix.types import BACKENDS

if TYPE_CHECKING:
    from fastprefix.measure.training.training_step import TrainingStep

TOGETHER = "together"
ORACLE = "auto takes the reference on this device: an oracle, not timed"
# random_llama's own, and Llama-3.2-1B's.
TINY: dict[str, Any] = {"hidden": 256, "layers": 4, "heads": 8, "kv_heads": 2, "vocab": 1024, "dtype": torch.float32}
LARGE: dict[str, Any] = {
    "hidden": 2048,
    "layers": 16,
    "heads": 32,
    "kv_heads": 8,
    "ffn": 8192,
    "vocab": 128256,
    "dtype": torch.bfloat16,
}


def problem(job: Train, device: str) -> Problem:
    """The operator's problem in one layer."""
    x = TINY if job.tiny else LARGE
    sizes = (job.batch, x["heads"], x["kv_heads"], job.tokens, job.num_virtual_tokens, x["hidden"] // x["heads"])
    return Problem.train(*sizes, dtype=x["dtype"], device=device)


def train(
    job: Train, device: str, blamed: dict[str, str], repeats: int, peaks: Peaks, before: Callable[[str], None]
) -> dict[str, Any]:
    """The row.

    Args:
        blamed: who may not run here again, and why.
        before: told who runs next.

    Raises:
        DeviceLostError: the device answers no more in this process.
    """
    shape = TINY if job.tiny else LARGE
    ours, untimed = _ours(problem(job, device))
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
    least = step_cost(model, problem(job, device))
    row.update(floor_s=peaks.seconds(least), bound=peaks.bound(least))

    def attempt(who: str, names: list[str], work: Callable[[dict[str, TrainingStep]], Any]) -> Any:
        """``work`` on these candidates; None and a failure in the row where that fails."""
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

    # Each alone first: one that cannot must not take the others along.
    able = []
    for name in (*ours, CAT, PEFT, FROZEN):
        if name not in blamed and attempt(name, [name], lambda steps: [step() for step in steps.values()]):
            able.append(name)
    # One that disagrees with the rest is found here, where all have the same prefix.
    results = None
    if able and TOGETHER not in blamed:
        results = attempt(TOGETHER, able, lambda steps: measure_steps(steps, repeats))
    for name, result in (results or {}).items():
        memory = {"saved_bytes": result.saved_bytes, "peak_bytes": result.peak_bytes}
        own = least if name != FROZEN else step_cost(model, problem(job, device).without_prefix())
        row["steps"][name] = {**median(result.timing, own), **memory}
    return row


def _ours(x: Problem) -> tuple[list[str], dict[str, str]]:
    """Names of ours that can be timed on such a problem, and why others cannot."""
    chosen = chosen_backend(x)
    named = {OURS: chosen, **{f"{OURS}:{name}": name for name in BACKENDS if name not in (chosen, "reference")}}
    untimed = {}
    for name, backend in named.items():
        if backend == "reference":
            untimed[name] = ORACLE
        elif reasons := backend_reasons(x, backend):
            untimed[name] = "; ".join(reasons)
        elif backend == "triton" and torch.device(x.device).type == "cpu":
            untimed[name] = INTERPRETED
    return [name for name in named if name not in untimed], untimed
