"""Count the instructions of the kernels' loops as shipped: ``python -m tests.backends.triton.count_instructions``.

That command writes what ``test_instructions.py`` holds the kernels to, for the compiler at hand. Given a GPU and a head
dim it counts for these alone and prints the result, and beside it loops of prefix and content with tiles of one size.
"""

from __future__ import annotations

import inspect
import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from fastprefix._triton.prefix_attn_bwd_dq import add_prefix_dq
from fastprefix._triton.prefix_attn_fwd import attend_prefix_range

from fastprefix.backends.launch import tile_config
from fastprefix.measure.kernels.gpu_units import GPUS
from fastprefix.measure.kernels.predict import PredictedKernel, predict_call
from fastprefix.measure.operator.problem import Problem

RECORDED = Path(__file__).with_name("instructions.json")
HEAD_DIMS = (64, 128)
KERNELS = ("fwd", "bwd_dq", "bwd_dkdv", "bwd_dprefix")
PREFIX_LOOPS = {"fwd": attend_prefix_range, "bwd_dq": add_prefix_dq}


def compiler() -> str:
    """The compilers that decide the counts: ``triton 3.9.0, ptxas 12.9``."""
    import triton
    from triton import knobs

    return f"triton {triton.__version__}, ptxas {knobs.nvidia.ptxas.version}"


def predict(gpu: str, D: int, *kernels: str) -> list[PredictedKernel]:
    """Kernels of a training step with a long prefix."""
    problem = Problem.train(2, 32, 8, 2048, 2048, D, dtype=torch.bfloat16)
    return predict_call(problem, GPUS[gpu], GPUS[gpu].sms, kernels)


def shipped(gpu: str, D: int) -> dict[str, list[int]]:
    """Instructions of a warp in an iteration of each loop with products, by kernel, in the order of the code."""
    return {
        kernel.name: [loop.cost.counts["issue"] for loop in kernel.loops if loop.cost.counts["tensor"]]
        for kernel in predict(gpu, D, *KERNELS)
    }


def equal_tiles(gpu: str, D: int, kernel: str) -> dict[str, int]:
    """Instructions of the shortest loop over a prefix and of the shortest over content, with tiles of one size."""
    capability = GPUS[gpu].capability
    tile = tile_config.tile(kernel, (capability, ""), D, 2, 2048)
    size = min(tile.BLOCK_N, tile.BLOCK_P)
    with tile_config.forced(kernel, replace(tile, BLOCK_N=size, BLOCK_P=size)):
        (found,) = predict(gpu, D, kernel)
    source, first = inspect.getsourcelines(PREFIX_LOOPS[kernel].fn)
    counts: dict[str, int] = {}
    for loop in found.loops:
        line = int(loop.place.partition(":")[2].partition("-")[0])
        part = "prefix" if first <= line < first + len(source) else "content"
        counts[part] = min(loop.cost.counts["issue"], counts.get(part, sys.maxsize))
    return counts


def count(gpu: str, D: int) -> dict[str, Any]:
    return {"shipped": shipped(gpu, D), "equal tiles": {kernel: equal_tiles(gpu, D, kernel) for kernel in PREFIX_LOOPS}}


def main() -> None:
    if sys.argv[1:]:
        print(json.dumps(count(sys.argv[1], int(sys.argv[2]))))
        return
    found = json.loads(RECORDED.read_text()) if RECORDED.exists() else {}
    found[compiler()] = {f"{gpu} D{D}": shipped(gpu, D) for gpu, D in itertools.product(sorted(GPUS), HEAD_DIMS)}
    RECORDED.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
