"""What binaries tell of kernels' speed without a GPU: for each loop the units' cycles, for each launch its waves.

A time cannot be told from it. Latencies, caches, memory and how far tensor cores and the rest overlap are not in the
instructions, and how often a loop runs depends on the call.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from fastprefix.measure.kernels.binary_options import BinaryOptions
from fastprefix.measure.kernels.compile_report import compile_launch, read_usage, resource_usage
from fastprefix.measure.kernels.gpu_units import Cost, Gpu, loop_cost
from fastprefix.measure.kernels.launch_recording import Launch, recorded_launches
from fastprefix.measure.kernels.occupancy import Occupancy, occupancy
from fastprefix.measure.kernels.sass import Function, capability, is_binary, listing, parse
from fastprefix.measure.kernels.sass_loops import find_loops, source_lines
from fastprefix.measure.kernels.tuning_targets import tuning_targets
from fastprefix.measure.operator.problem import Problem

# Published times of attention kernels on an H100 are 0.78 to 1.55 times the sum that this model gives for such kernels,
# so two kernels whose sums are nearer to each other cannot be ranked.
UNCERTAINTY = 1.5
# A loop in which no instruction goes to these units only waits.
_WORK = ("tensor", "FP32", "MUFU", "SHFL", "LSU")


@dataclass(frozen=True)
class PredictedLoop:
    """One loop: its lines in the source or its address, what an iteration costs, and how many more instructions stand
    under a branch, which are not counted.
    """

    place: str
    cost: Cost
    sometimes: int


@dataclass(frozen=True)
class PredictedKernel:
    """One kernel. What is not known of a foreign binary is None; ``tile`` is the rows and keys of an iteration."""

    name: str
    threads: int
    registers: int | None
    shared: int
    occupancy: Occupancy | None
    programs: int | None
    loops: list[PredictedLoop]
    tile: tuple[int, int] | None = None


def predict_call(problem: Problem, gpu: Gpu, sms: int, kernels: Collection[str] | None = None) -> list[PredictedKernel]:
    """The Triton kernels that a call launches on a GPU, each once; ``kernels``: names as in tile tables, or all.

    Raises:
        ValueError: the kernels do not support the problem, or one that is named is not launched.
    """
    launches: dict[object, Launch] = {}
    # The epilogue's prefix may have been cut short, which is another call.
    for target in (x for x in tuning_targets(problem) if x.problem == problem):
        with recorded_launches(gpu.capability, sms=sms) as recorded:
            leaves = target.meta_leaves()
            if target.is_refused(leaves):
                raise ValueError(f"--predict: got {problem.label}, expected a call that the Triton kernels take")
            target(leaves)
        for launch in recorded:
            launches.setdefault(launch.fingerprint, launch)
    names = sorted({launch.name for launch in launches.values()})
    if unknown := sorted(set(kernels or ()) - set(names)):
        raise ValueError(f"--kernel: got {', '.join(unknown)}, expected one of {', '.join(names)} with this shape")
    return [predict_launch(x, gpu) for x in launches.values() if kernels is None or x.name in kernels]


def predict_launch(launch: Launch, gpu: Gpu) -> PredictedKernel:
    """Compile the kernel of a launch, about a second, and look at its loops."""
    binary = compile_launch(launch, gpu.capability)
    usage = read_usage(binary)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(binary.asm["cubin"])
        (function,) = parse(listing(path))
    warps = launch.options["num_warps"]
    held = occupancy(32 * warps, usage.registers, usage.shared, gpu)
    loops = predict_loops(function, warps, gpu)
    return PredictedKernel(launch.name, 32 * warps, usage.registers, usage.shared, held, launch.programs, loops)


def predict_binary(options: BinaryOptions, gpu: Gpu) -> list[PredictedKernel]:
    """The kernels of a cubin of any compiler, or of a listing of one, which tells no registers.

    Raises:
        ValueError: the file is neither, is for another GPU or has no such kernel, or a kernel does not fit into a
            multiprocessor.
    """
    text = listing(options.path)
    if (made_for := capability(text)) not in (None, gpu.capability):
        raise ValueError(f"--binary: got {options.path} for sm_{made_for}, expected sm_{gpu.capability} of {gpu.name}")
    functions = [x for x in parse(text) if options.kernel in x.name]
    if not functions:
        named = f"with a kernel named *{options.kernel}*" if options.kernel else "with instructions"
        raise ValueError(f"--binary: got {options.path}, expected a cubin or a listing of one {named}")
    usage = resource_usage(options.path, "--predict") if is_binary(options.path) else {}
    found = []
    for function in functions:
        registers = usage[function.name]["REG"] if usage else None
        held = None if registers is None else occupancy(options.threads, registers, options.shared, gpu)
        known = (options.threads, registers, options.shared, held, options.programs)
        loops = predict_loops(function, -(-options.working // 32), gpu)
        found.append(PredictedKernel(f"{options.path.stem}:{function.name}", *known, loops, options.tile))
    return found


def predict_loops(function: Function, warps: int, gpu: Gpu) -> list[PredictedLoop]:
    """The loops of a kernel that do more than wait, each run by ``warps`` warps of a block."""
    found = []
    for loop in find_loops(function):
        cost = loop_cost(loop.always, warps, gpu)
        if any(cost.counts[unit] for unit in _WORK):
            matrix = [x for x in loop.always if x.name in ("HMMA", "HGMMA")]
            place = source_lines(matrix or loop.always) or f"{loop.address:#x}"
            found.append(PredictedLoop(place, cost, len(loop.sometimes)))
    return found


def rank(first: PredictedKernel, second: PredictedKernel) -> str:
    """Which of two kernels' cheapest loops needs fewer cycles for a row and a key; "first" or "second".

    Raises:
        ValueError: the model cannot tell: they are too near to each other, or what an iteration does is not known.
    """
    ranges = []
    for kernel in (first, second):
        costs = [loop.cost for loop in kernel.loops if loop.cost.counts["tensor"]]
        if kernel.tile is None or not costs:
            raise ValueError(f"rank: got {kernel.name}, expected kernels with products in a loop and a tile=ROWSxKEYS")
        best, size = min(costs, key=lambda cost: cost.sum), kernel.tile[0] * kernel.tile[1]
        ranges.append((best.sum / size, best.overlapped / size))
    ratios = [b / a for a, b in zip(*ranges, strict=True)]
    if min(ratios) >= UNCERTAINTY:
        return "first"
    if max(ratios) <= 1 / UNCERTAINTY:
        return "second"
    low, high = sorted(ratios)
    raise ValueError(
        f"rank: got {first.name} and {second.name}, whose cycles are in ratios of {low:.2f} to {high:.2f}, expected a "
        f"factor of {UNCERTAINTY} or more: the model tells no smaller difference"
    )
