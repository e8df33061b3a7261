"""``fastprefix bench --resources`` and ``--tune``: check tiles of the Triton kernels without a GPU, or time them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fastprefix.backends.launch import tile_config
from fastprefix.machine import device
from fastprefix.machine.text_table import text_table
from fastprefix.measure import report_tables
from fastprefix.measure.operator.problem import DTYPES, Problem

if TYPE_CHECKING:
    from fastprefix.backends.launch.tile_config import Tile
    from fastprefix.measure.kernels.autotune import TuningResult
    from fastprefix.measure.kernels.compile_report import CompileResult

TARGETS = {"sm_80": 80, "sm_90": 90}
# Options, each with those that it belongs to.
OWNERS = (
    *(("target", "resources"), ("quick", "resources"), ("kernel", "tune", "predict"), ("out", "tune")),
    *(("gpu", "predict"), ("sms", "predict"), ("binary", "predict")),
)
# The shapes of --tune without --shape: B, H, H_kv, S, P, D; S counts tokens in training and cached keys in decoding.
TRAINING = [
    (B, *heads, S, 128, D) for *heads, D in ((32, 8, 128), (12, 12, 64)) for B, S in ((32, 512), (8, 2048), (2, 8192))
]
DECODING = [(B, *heads, 512, 2048, D) for *heads, D in ((32, 8, 128), (12, 12, 64)) for B in (256, 32, 1)]


def add_kernel_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``fastprefix bench`` that concern tiles."""
    group = parser.add_argument_group("tiles of the Triton kernels")
    group.add_argument("--resources", action="store_true", help="compile every shipped tile and show what it takes")
    group.add_argument("--target", choices=sorted(TARGETS), help="of --resources (all); no GPU is needed")
    group.add_argument("--quick", action="store_true", help="of --resources: each tile once")
    group.add_argument("--tune", action="store_true", help="time other tiles on this device, write the best as a table")
    group.add_argument(
        "--kernel", action="append", metavar="NAME", help="of --tune and --predict (all), as in the table; repeatable"
    )
    group.add_argument("--out", type=Path, metavar="FILE", help="of --tune (./tiles-DEVICE.json)")


def check_options(args: argparse.Namespace) -> None:
    """Raise ValueError where options contradict each other."""
    if sum((args.resources, args.tune, args.predict)) > 1:
        raise ValueError("--resources, --tune and --predict: expected one of them")
    for option, *owners in OWNERS:
        if getattr(args, option) not in (None, False) and not any(getattr(args, owner) for owner in owners):
            raise ValueError(f"--{option}: expected --{' or --'.join(owners)} with it")


def resources_main(target: str | None, quick: bool, markdown: bool) -> int:
    """Print the registers, spills, shared memory and instructions of every shipped kernel.

    Returns:
        1 if a kernel spills, does not fit into shared memory or leaves the tensor cores idle, else 0.

    Raises:
        ValueError: nothing can be compiled on this machine, or a file is not a tile table.
    """
    from fastprefix.measure.kernels.compile_matrix import plan_compilation
    from fastprefix.measure.kernels.compile_report import compile_all, cuobjdump

    cuobjdump()
    jobs, missing = plan_compilation([TARGETS[target]] if target else list(TARGETS.values()), quick)
    print(f"compiling {len(jobs)} kernels, about a second each on each processor", file=sys.stderr)
    results = list(compile_all(jobs))
    draw = report_tables.markdown_table if markdown else text_table
    print(draw(HEADERS, [_row(result) for result in results]))
    for line in missing:
        print(f"  {line}")
    failed = sum(bool(result.reasons) for result in results)
    print(f"{len(results)} kernels, {failed} of them bad; {len(missing)} faults of the tables")
    return int(bool(failed or missing))


def tune_main(args: argparse.Namespace) -> int:
    """Time candidate tiles on this device, and write the best as a table that ``$FASTPREFIX_TILES`` can name.

    Returns:
        0.

    Raises:
        ValueError: the Triton backend cannot run here, a kernel does not exist, or a file is not a tile table.
    """
    from fastprefix.measure.kernels.autotune import tune
    from fastprefix.measure.kernels.search_space import AXES

    if unknown := sorted(set(args.kernel or ()) - set(AXES)):
        raise ValueError(f"--kernel {', '.join(unknown)}: expected one of {', '.join(AXES)}")
    dtype = DTYPES[args.dtype or "bf16"]
    training = ([] if args.decode else args.shape) if args.shape else TRAINING
    decoding = (args.shape if args.decode else []) if args.shape else DECODING
    problems = [Problem.train(*shape, dtype=dtype, device=args.device) for shape in training]
    problems += [Problem.decode(*shape, dtype=dtype, device=args.device) for shape in decoding]
    name = device.name(torch.device(args.device)) if torch.device(args.device).type == "cuda" else "interpreter"
    out = args.out or Path(f"tiles-{tile_config.slug(name)}.json")
    outcomes = tune(problems, out, args.kernel, repeats=args.repeats, report=lambda x: print(_line(x), flush=True))
    better = sum(x.best != x.asked.tile for x in outcomes)
    print(f"{name}: {better} of {len(outcomes)} tiles changed, all are in {out}. To use them: FASTPREFIX_TILES={out}")
    if name != "interpreter":
        print(f"To see them compiled in every variant: FASTPREFIX_TILES={out} fastprefix bench --resources")
    return 0


def _line(x: TuningResult) -> str:
    kernel, D, itemsize, S, tile = x.asked
    tried = f"{x.tried} tried, {len(x.discarded)} of them discarded"
    times = f"{report_tables.seconds(x.before)} with {_words(tile)}"
    change = "stays" if x.best == tile else f"-> {report_tables.seconds(x.after)} with {_words(x.best)}"
    return f"{kernel} D{D} {8 * itemsize} bits S{S}: {times} {change}; {tried}"


def _words(x: Tile) -> str:
    flags = "".join(f" {name}" for name in ("TMA", "SPLIT") if getattr(x, name))
    return f"{x.BLOCK_M}/{x.BLOCK_N}/{x.BLOCK_P} {x.num_warps} warps {x.num_stages} stages{flags}"


HEADERS = (
    *("kernel", "target", "D", "dtype", "S", "tile M/N/P", "warps", "stages", "variant", "loads"),
    *("registers", "spills", "shared", "limit", "tensor cores", "verdict"),
)


def _row(result: CompileResult) -> Sequence[object]:
    from fastprefix.measure.kernels.compile_report import SHARED
    from fastprefix.measure.kernels.kernel_calls import DTYPE_NAMES

    call, options, usage = result.job.calls[0], result.options, result.usage
    tile = "/".join(str(options.get(name, "-")) for name in ("BLOCK_M", "BLOCK_N", "BLOCK_P"))
    lengths = ",".join(map(str, sorted({x.S for x in result.job.calls})))
    taken: tuple[object, ...] = ("-", "-", "-") if usage is None else (usage.registers, usage.stack, usage.shared)
    return (
        *(result.kernel, f"sm_{call.capability}", call.D, DTYPE_NAMES[call.itemsize], lengths),
        *(tile, options["num_warps"], options["num_stages"], call.variant.name),
        "TMA" if options.get("TMA") else "pointers",
        *(*taken, SHARED[call.capability], "-" if usage is None else usage.tensor_cores),
        "; ".join(result.reasons) or "good",
    )
