"""How long the plan takes on an H100, estimated from floors: is it within the budget, and what is it spent on.

Constants are guesses on the high side until a run's ``wall_s`` corrects them.
"""

from __future__ import annotations

from collections.abc import Sequence

from benches import correctness, step
from benches.arguments import CALLS
from benches.plan import Check, Equal, Job, Time, Train
from benches.work import REPEATS, STEP_REPEATS
from fastprefix.measure import Peaks, cost

START = 25.0  # imports, dynamo's among them, the device's context, its peaks
CASE = 0.12  # truth in fp64, eager and ours, forward and backward
COMPILED = 2.0  # torch.compile of the operator, for each case
MODEL_CASE = 0.5  # three models forward and backward
BUILD = 2.0  # an architecture's three models, once for each dtype
ROW = 0.7  # random leaves, everybody once and checked, memory given back
FLEX = {"forward": 6.0, "backward": 12.0, "decode": 8.0}
KERNEL = 1.2  # a Triton kernel's compilation on one core

# What attention reaches, not what matrix products do; and copies.
PEAKS = Peaks(gb_s=2500.0, tflop_s=350.0)
# All peers' times together over the floor: the dense mask alone is 8 to 10 of it.
TOGETHER = {"forward": 22.0, "backward": 28.0, "lowest": 28.0}
CACHE_READS = 9.0  # by the peers of decoding, of caches that hold the prefix of every sample
ROUNDS = REPEATS + 3 + 4  # timed; checked and warmed; a graph's warm-up
STEP_WHO, STEP_ROUNDS, STEP_OVER_FLOOR, STEP_SETUP = 6, STEP_REPEATS + 6, 3.0, 6.0


def seconds(job: Job) -> float:
    """Of one row, its Triton kernels compiled already."""
    match job:
        case Check():
            return _check(job)
        case Equal():
            new = BUILD if job.backend == "reference" else 0.0
            return new + MODEL_CASE * (2 + (job.dtype == "fp32" and job.model != "BERT"))
        case Time():
            return _time(job)
        case Train():
            return _train(job)


def _check(job: Check) -> float:
    if job.what == "arguments":
        return CASE * len(CALLS)
    count = len(correctness.problems(job.dtype, job.compiled, smoke=False))
    return count * (CASE + (COMPILED if job.compiled else 0.0))


def _time(job: Time) -> float:
    x, least = job.problem, cost(job.problem, job.mode)
    if job.mode == "decode":
        cache = 2 * x.B * x.H_kv * (x.P + x.T) * x.D * x.dtype.itemsize
        device = CACHE_READS * cache / (PEAKS.gb_s * 1e9)
    else:
        device = TOGETHER[job.mode] * PEAKS.seconds(least)
    return ROW + ROUNDS * device + (FLEX[job.mode] if job.flex else 0.0)


def _train(job: Train) -> float:
    """From the linear layers' products alone, forward and backward."""
    x = step.TINY if job.tiny else step.LARGE
    width = x["hidden"] * (1 + 2 * x["kv_heads"] / x["heads"] + 1) + 3 * x.get("ffn", 688)
    weights = x["hidden"] * (x["layers"] * width + x["vocab"])
    floor = 4 * weights * job.batch * job.tokens / (PEAKS.tflop_s * 1e12)
    return STEP_SETUP + STEP_WHO * STEP_ROUNDS * STEP_OVER_FLOOR * floor


def compilation(kernels: int, processes: int) -> float:
    """Of that many kernels, each process importing torch first."""
    return 8.0 + kernels * KERNEL / processes


def listing(plan: Sequence[Job]) -> str:
    """Every row in order, its seconds, and the seconds until then."""
    lines, total = [f"{START:6.0f} s  {'start':<60}"], START
    for job in plan:
        own = seconds(job)
        total += own
        lines.append(f"{total:6.0f} s  {job.key:<60} {own:5.1f} s")
    return "\n".join(lines)
