"""``fastprefix bench``: time the operator against other implementations of it in one process."""

from __future__ import annotations

import argparse

import torch

from fastprefix.cli import bench_kernels, bench_predict
from fastprefix.cli.options import whole_number
from fastprefix.machine import device
from fastprefix.machine.text_table import text_table
from fastprefix.machine.timing import ratio
from fastprefix.measure import report_tables
from fastprefix.measure.operator.candidates import OURS, candidates_for
from fastprefix.measure.operator.problem import DTYPES, Mode, Problem
from fastprefix.measure.operator.roofline import Cost, cost, measure_peaks
from fastprefix.measure.operator.runner import Measured, measure

TRAIN_SHAPES = ((8, 12, 12, 128, 16, 64), (8, 12, 12, 128, 512, 64), (8, 9, 3, 128, 512, 64))
TITLES: dict[Mode, str] = {
    "forward": "forward",
    "backward": "forward and backward",
    "lowest": "forward and backward of the lowest layer (the prefix's gradients alone)",
    "decode": "decode",
}
DECODE_SHAPES = ((1, 9, 3, 16, 2048, 64), (32, 9, 3, 16, 2048, 64))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``fastprefix bench``."""
    sizes = "batch, query heads, key/value heads, tokens (with --decode: keys in the cache), prefix tokens, head dim"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--shape", type=_shape, action="append", metavar="B,H,H_kv,S,P,D", help=f"{sizes}; repeatable")
    parser.add_argument("--dtype", choices=sorted(DTYPES), help="(fp32; with --tune and --predict bf16)")
    parser.add_argument("--device", default=device, help="(%(default)s)")
    parser.add_argument("--repeats", type=whole_number(), default=7, metavar="N", help="timed rounds (%(default)s)")
    parser.add_argument("--decode", action="store_true", help="one new token instead of training")
    parser.add_argument("--lowest", action="store_true", help="training, and where the prefix alone is trained")
    parser.add_argument("--peer", action="append", metavar="NAME", help="only these peers; repeatable")
    parser.add_argument("--markdown", action="store_true", help="print Markdown tables")
    bench_kernels.add_kernel_arguments(parser)
    bench_predict.add_predict_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Time the operator against the other candidates, a table for each shape; or run :mod:`bench_kernels`
    or :mod:`bench_predict`.

    Returns:
        1 if a candidate's result disagrees with the others, or a kernel is bad, else 0.

    Raises:
        ValueError: a shape, candidate or device does not exist, or options contradict each other.
    """
    bench_kernels.check_options(args)
    if args.decode and args.lowest:
        raise ValueError("--decode and --lowest: expected one of the two")
    if args.resources:
        return bench_kernels.resources_main(args.target, args.quick, args.markdown)
    if args.predict:
        return bench_predict.predict_main(args)
    _check_device(args.device)
    if args.tune:
        return bench_kernels.tune_main(args)
    dtype_name, wrong = args.dtype or "fp32", False
    dtype = DTYPES[dtype_name]
    modes: tuple[Mode, ...] = ("decode",) if args.decode else ("forward", "backward")
    if args.lowest:
        modes = (*modes, "lowest")
    build = Problem.decode if args.decode else Problem.train
    shapes = args.shape or (DECODE_SHAPES if args.decode else TRAIN_SHAPES)
    problems = [build(*shape, dtype=dtype, device=args.device) for shape in shapes]
    _check_peers(args.peer, problems[0], modes[0])
    peaks = measure_peaks(args.device, dtype)
    print(f"{device.name(torch.device(args.device))}, {torch.get_num_threads()} threads, torch {torch.__version__}:")
    print(f"copies at {peaks.gb_s:.0f} GB/s, multiplies at {peaks.tflop_s:.2f} TFLOP/s in {dtype_name}")
    for problem in problems:
        for mode in modes:
            found = measure(problem, mode, args.repeats, only=args.peer)
            wrong = wrong or bool(found.wrong)
            least = cost(problem, mode)
            title = TITLES[mode]
            floor = f"{report_tables.seconds(peaks.seconds(least))} ({peaks.bound(least)})"
            print(f"\n{problem.label}, {title}; floor {floor}")
            print(_table(found, least, args.markdown))
            for name, reason in found.failures.items():
                print(f"  {name}: {reason}")
    return int(wrong)


def _table(found: Measured, least: Cost, markdown: bool) -> str:
    about = {candidate.name: candidate.about for candidate in candidates_for(found.problem, found.mode)}
    rows = []
    for name, timing in sorted(found.timings.items(), key=lambda item: item[1].median):
        times = [report_tables.seconds(x) for x in (timing.median, timing.best)]
        against = str(ratio(found.timings, name, OURS)) if OURS in found.timings else "-"
        speed = f"{least.bandwidth(timing.median):.1f}", f"{1e3 * least.rate(timing.median):.1f}"
        rows.append((name, *times, against, *speed, about[name]))
    draw = report_tables.markdown_table if markdown else text_table
    return draw(("peer", "median", "best", "time / ours", "GB/s", "GFLOP/s", "what it is"), rows)


def _check_device(name: str) -> None:
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from error


def _check_peers(names: list[str] | None, problem: Problem, mode: Mode) -> None:
    known = [candidate.name for candidate in candidates_for(problem, mode)]
    unknown = sorted(set(names or ()) - set(known))
    if unknown:
        raise ValueError(f"--peer {', '.join(unknown)}: expected one of {', '.join(known)}")


def _shape(text: str) -> tuple[int, ...]:
    expected = "expected six whole numbers B,H,H_kv,S,P,D"
    try:
        B, H, H_kv, S, P, D = sizes = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text!r}, {expected}") from None
    try:
        Problem.train(B, H, H_kv, S, P, D)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"got {text!r}, {expected}: {error}") from None
    return sizes
