"""The tiles that ``--tune`` tries for each kernel: a small, explicit grid, as each takes about a second to compile."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

from fastprefix.backends.launch import tile_config
from fastprefix.backends.launch.tile_config import Tile

BOTH = (True, False)
# Fields that are not named keep their values from the present tile.
AXES: dict[str, dict[str, tuple[Any, ...]]] = {
    "fwd": {
        "BLOCK_M": (64, 128),
        "BLOCK_N": (32, 64, 128),
        "num_warps": (4, 8),
        "num_stages": (2, 3),
        "TMA": BOTH,
        "SPLIT": BOTH,
    },
    "bwd_dq": {
        "BLOCK_M": (64, 128),
        "BLOCK_N": (32, 64, 128),
        "num_warps": (4, 8),
        "num_stages": (2, 3),
        "TMA": BOTH,
        "SPLIT": BOTH,
    },
    "bwd_dkdv": {
        "BLOCK_M": (32, 64, 128),
        "BLOCK_N": (64, 128),
        "num_warps": (4, 8),
        "num_stages": (1, 2),
        "TMA": BOTH,
        "SPLIT": BOTH,
    },
    "bwd_dprefix": {
        "BLOCK_M": (32, 64, 128),
        "BLOCK_P": (32, 64, 128),
        "num_warps": (4, 8),
        "num_stages": (2, 3),
    },
    "epilogue_fwd": {"BLOCK_M": (32, 64, 128), "num_warps": (4, 8), "num_stages": (1, 2)},
    "epilogue_bwd": {"BLOCK_M": (32, 64, 128), "num_warps": (4, 8), "num_stages": (1, 2, 3)},
    "decode_prefix": {
        "BLOCK_M": (16, 32, 64, 128),
        "BLOCK_P": (32, 64, 128),
        "num_warps": (4, 8),
        "num_stages": (2, 3),
        "TMA": BOTH,
    },
    "decode_content": {
        "BLOCK_N": (32, 64, 128),
        "num_warps": (2, 4, 8),
        "num_stages": (2, 3, 4),
        "TMA": BOTH,
    },
}
# Bounds on the fp32 values of one accumulator in a thread: with more it spills, with fewer it has hardly any work.
MAX_ACCUMULATOR, MIN_ACCUMULATOR = 128, 4


def candidate_tiles(kernel: str, D: int, tile: Tile) -> list[Tile]:
    """The tiles to try instead of ``tile`` for a kernel and padded head dim ``D``; empty for a kernel without tiles."""
    axes = AXES.get(tile_config.launched(kernel), {})
    if kernel.endswith(tile_config.GENERAL):
        axes = {**axes, "TMA": (False,)}
    found = [replace(tile, **dict(zip(axes, values, strict=True))) for values in itertools.product(*axes.values())]
    return [x for x in found if x != tile and MIN_ACCUMULATOR <= _accumulator(kernel, D, x) <= MAX_ACCUMULATOR]


def _accumulator(kernel: str, D: int, tile: Tile) -> float:
    rows = {"bwd_dkdv": tile.BLOCK_N, "bwd_dprefix": tile.BLOCK_P}.get(tile_config.launched(kernel), tile.BLOCK_M)
    return rows * D / (32 * tile.num_warps)
