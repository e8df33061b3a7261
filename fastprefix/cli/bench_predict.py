"""``fastprefix bench --predict``: what the Triton kernels of a call, or a foreign binary, ask of a GPU's units."""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fastprefix.cli.options import whole_number
from fastprefix.machine.text_table import text_table
from fastprefix.measure import report_tables
from fastprefix.measure.kernels.binary_options import EXPECTED, BinaryOptions, parse_binary_options
from fastprefix.measure.kernels.gpu_units import GPUS, UNITS
from fastprefix.measure.operator.problem import DTYPES, Problem

if TYPE_CHECKING:
    from fastprefix.measure.kernels.predict import PredictedKernel

TRAIN_SHAPE, DECODE_SHAPE = (2, 32, 8, 2048, 512, 128), (32, 32, 8, 512, 2048, 128)

KERNEL_HEADERS = ("kernel", "warps", "registers", "shared", "blocks an SM", "limit", "programs", "waves", "idle")
LOOP_HEADERS = ("kernel", "loop", *UNITS, "under branches", "binding", "overlapped", "sum")
LEGEND = """\
A unit's column: instructions of a warp in one iteration, then cycles of a multiprocessor for a block's warps.
overlapped: cycles if all units could work at once; sum: if tensor cores and the rest took turns. Latencies, memory and
caches are not in it, and no time follows from it. idle: places empty in the last wave, if all programs took as long."""


def add_predict_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``fastprefix bench`` that concern predictions."""
    group = parser.add_argument_group("predictions from compiled kernels, without a GPU")
    group.add_argument("--predict", action="store_true", help="count instructions and cycles by unit for one --shape")
    group.add_argument("--gpu", choices=sorted(GPUS), help="of --predict (h100)")
    group.add_argument("--sms", type=whole_number(), metavar="N", help="of --predict: multiprocessors (the GPU's)")
    group.add_argument(
        "--binary",
        type=_binary,
        action="append",
        metavar="FILE:threads=N",
        help=f"of --predict: kernels of any compiler, {EXPECTED}; repeatable",
    )


def predict_main(args: argparse.Namespace) -> int:
    """Print the units, waves and loops of the kernels of a call, or of the binaries that are given.

    Returns:
        0.

    Raises:
        ValueError: kernels cannot be compiled or read here, or the kernels do not take the call.
    """
    from fastprefix.measure.kernels.compile_report import cuobjdump
    from fastprefix.measure.kernels.predict import predict_binary, predict_call

    gpu = GPUS[args.gpu or "h100"]
    sms = gpu.sms if args.sms is None else args.sms
    draw = report_tables.markdown_table if args.markdown else text_table
    binaries: list[list[PredictedKernel]] = []
    if args.binary:
        binaries = [predict_binary(binary, gpu) for binary in args.binary]
        kernels = list(itertools.chain(*binaries))
        about = ", ".join(binary.path.name for binary in args.binary)
    else:
        cuobjdump("--predict")
        shapes = args.shape or [DECODE_SHAPE if args.decode else TRAIN_SHAPE]
        if len(shapes) > 1:
            raise ValueError(f"--shape: got {len(shapes)} shapes, expected one with --predict")
        build = Problem.decode if args.decode else Problem.train
        problem = build(*shapes[0], dtype=DTYPES[args.dtype or "bf16"])
        print("compiling, about a second for each kernel", file=sys.stderr)
        kernels, about = predict_call(problem, gpu, sms, args.kernel), problem.label
    print(f"{about}, for {gpu.name} with {sms} multiprocessors; nothing was run\n")
    print(draw(KERNEL_HEADERS, [_kernel_row(kernel, sms) for kernel in kernels]) + "\n")
    print(draw(LOOP_HEADERS, [row for kernel in kernels for row in _loop_rows(kernel)]) + "\n")
    print(LEGEND)
    for one, other in itertools.combinations(binaries, 2):
        for first, second in itertools.product(one, other):
            print(_order(first, second))
    return 0


def _order(first: PredictedKernel, second: PredictedKernel) -> str:
    from fastprefix.measure.kernels.predict import rank

    try:
        better = rank(first, second)
    except ValueError as error:
        return str(error)
    few, many = (first, second) if better == "first" else (second, first)
    return f"rank: {few.name} needs fewer cycles for a row and a key than {many.name}"


def _kernel_row(kernel: PredictedKernel, sms: int) -> Sequence[object]:
    held, programs, waves, idle = kernel.occupancy, kernel.programs, "-", "-"
    if held is not None and programs is not None:
        waves, idle = f"{held.waves(programs, sms):.2f}", f"{held.idle(programs, sms):.0%}"
    limit = ("-", "-") if held is None else (held.blocks, held.limit)
    taken = ("-" if kernel.registers is None else kernel.registers, kernel.shared, *limit)
    return kernel.name, kernel.threads // 32, *taken, "-" if programs is None else programs, waves, idle


def _loop_rows(kernel: PredictedKernel) -> list[Sequence[object]]:
    rows: list[Sequence[object]] = []
    for loop in kernel.loops:
        cost = loop.cost
        units = (f"{cost.counts[unit]}: {cost.cycles[unit]}" for unit in UNITS)
        rows.append((kernel.name, loop.place, *units, loop.sometimes, cost.binding, cost.overlapped, cost.sum))
    return rows or [(kernel.name, "no loop", *("-" for _ in UNITS), "-", "-", "-", "-")]


def _binary(text: str) -> BinaryOptions:
    try:
        return parse_binary_options(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
