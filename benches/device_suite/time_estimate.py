"""An estimate, from the roofline, of how long each row of the plan takes on an H100.

The constants are high guesses, to be corrected by the ``wall_s`` of a run.
"""

from __future__ import annotations

from collections.abc import Sequence

from benches.device_suite import operator_correctness, training_rows
from benches.device_suite.job_runner import LONG_REPEATS, REPEATS, STEP_REPEATS
from benches.device_suite.operator_calls import CALLS
from benches.device_suite.plan import Job, ModelCheck, OperatorCheck, OperatorTiming, TrainingTiming
from fastprefix.measure import Peaks, cost

START = 25.0  # imports (dynamo is one of them), the device's context, measuring its peaks
CASE = 0.12  # the reference in fp64, eager and ours, forward and backward
COMPILED = 2.0  # torch.compile of the operator, for each case
MODEL_CASE = 0.5  # three models forward and backward
BUILD = 2.0  # an architecture's three models, once for each dtype
ROW = 0.7  # random inputs, each candidate once with its check, freeing memory
FLEX = {"forward": 6.0, "backward": 12.0, "decode": 8.0}
KERNEL = 1.2  # a Triton kernel's compilation on one core

# The rates that attention and copies reach, below those of matrix products.
PEAKS = Peaks(gb_s=2500.0, tflop_s=350.0)
# The times of all candidates together over the roofline time; the dense mask alone is 8 to 10 of it.
TOGETHER = {"forward": 22.0, "backward": 28.0, "lowest": 28.0}
WITHOUT_MASKS = 0.4  # of those times, where no candidate has a dense mask
CACHE_READS = 9.0  # by decoding's baselines, of caches that hold the prefix for every sample
EXTRA_ROUNDS = 3 + 4  # checked and warmed; a graph's warm-up
STEP_WHO, STEP_ROUNDS, STEP_OVER_FLOOR, STEP_SETUP = 6, STEP_REPEATS + 6, 3.0, 6.0


def seconds(job: Job) -> float:
    """The seconds of one row whose Triton kernels are compiled already."""
    match job:
        case OperatorCheck():
            return _check(job)
        case ModelCheck():
            new = BUILD if job.backend == "reference" else 0.0
            return new + MODEL_CASE * (2 + (job.dtype == "fp32" and job.model != "BERT"))
        case OperatorTiming():
            return _time(job)
        case TrainingTiming():
            return _train(job)


def _check(job: OperatorCheck) -> float:
    if job.what == "arguments":
        return CASE * len(CALLS)
    count = len(operator_correctness.problems(job.dtype, job.compiled, smoke=False))
    return count * (CASE + (COMPILED if job.compiled else 0.0))


def _time(job: OperatorTiming) -> float:
    x, least = job.problem, cost(job.problem, job.mode)
    if job.mode == "decode":
        cache = 2 * x.B * x.H_kv * (x.P + x.T) * x.D * x.dtype.itemsize
        device = CACHE_READS * cache / (PEAKS.gb_s * 1e9)
    else:
        device = TOGETHER[job.mode] * PEAKS.seconds(least) * (WITHOUT_MASKS if job.long else 1.0)
    rounds = (LONG_REPEATS if job.long else REPEATS) + EXTRA_ROUNDS
    return ROW + rounds * device + (FLEX[job.mode] if job.flex else 0.0)


def _train(job: TrainingTiming) -> float:
    """The seconds of a training row, from the matrix products of its linear layers, forward and backward."""
    x = training_rows.TINY_LLAMA if job.tiny else training_rows.LLAMA_1B
    width = x["hidden"] * (1 + 2 * x["kv_heads"] / x["heads"] + 1) + 3 * x.get("ffn", 688)
    weights = x["hidden"] * (x["layers"] * width + x["vocab"])
    floor = 4 * weights * job.batch * job.tokens / (PEAKS.tflop_s * 1e12)
    return STEP_SETUP + STEP_WHO * STEP_ROUNDS * STEP_OVER_FLOOR * floor


def compilation(kernels: int, processes: int) -> float:
    """The seconds to compile that many kernels, including each process's import of torch."""
    return 8.0 + kernels * KERNEL / processes


def listing(plan: Sequence[Job]) -> str:
    """Every row in order with its seconds, and the seconds from the start to its end."""
    lines, total = [f"{START:6.0f} s  {'start':<60}"], START
    for job in plan:
        own = seconds(job)
        total += own
        lines.append(f"{total:6.0f} s  {job.key:<60} {own:5.1f} s")
    return "\n".join(lines)
