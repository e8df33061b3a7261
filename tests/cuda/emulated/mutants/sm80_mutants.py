"""Faults of the forward and backward for devices other than Hopper: those of every barrier and wait, and of layouts."""

from __future__ import annotations

from tests.cuda.emulated.mutants.mutant import Mutant
from tests.cuda.emulated.mutants.prefix_bias_mutants import BACKWARD_BIAS_MUTANTS, FORWARD_BIAS_MUTANTS, without_weight

FORWARD, TILES, PRODUCTS = "forward/sm80.cuh", "forward/key_tiles.cuh", "mma_tiles.cuh"
ROWS, KEYS, BLOCK = (f"backward/{name}.cuh" for name in ("rows_sm80", "keys_sm80", "key_block"))
RACE = "race|in flight|nothing wrote|without a barrier"
WAIT, BARRIER = (
    "    cp_async_wait_group<0>();\n",
    "    sync_block();   // all threads' {} are there, and all warps are done with {}\n",
)
KEYS_THERE = BARRIER.format("keys", "the values before")
VALUES_THERE = BARRIER.format("values", "the keys")
BOTH_THERE = BARRIER.format("keys and values", "the tiles before")
ROWS_THERE = BARRIER.format("rows", "those before").replace("    ", "      ", 1)

SM80_FORWARD_MUTANTS = [
    Mutant("keys are not waited for", FORWARD, WAIT + KEYS_THERE, KEYS_THERE, "in flight", "long"),
    Mutant("values are overwritten while they are read", FORWARD, WAIT + KEYS_THERE, WAIT, RACE, "long"),
    Mutant("values are not waited for", FORWARD, WAIT + VALUES_THERE, VALUES_THERE, "in flight", "long"),
    Mutant("keys are overwritten while they are read", FORWARD, WAIT + VALUES_THERE, WAIT, RACE, "long"),
    Mutant(
        "the list is read before it is there",
        FORWARD,
        "    sync_block();   // rows, list and tile are there\n",
        "",
        RACE,
        "packed texts",
    ),
    Mutant("both parts have the same rows", FORWARD, "i * 64 + warp * 16, step", "warp * 16, step", "", "long"),
    Mutant("values are not transposed", PRODUCTS, "ldmatrix_x4_trans(b", "ldmatrix_x4(b", "", "long"),
    Mutant(
        "keys in the order of rows",
        PRODUCTS,
        "first + j * 16 + lane_row_by_columns(lane)",
        "first + j * 16 + lane_row_by_rows(lane)",
        "",
        "long",
    ),
    Mutant("a prefix's tile is not left", TILES, "Walk::advance(at.walk);", ";", "", "long"),
    *FORWARD_BIAS_MUTANTS,
]

SM80_BACKWARD_MUTANTS = [
    Mutant("keys and values are not waited for", ROWS, WAIT + BOTH_THERE, BOTH_THERE, "in flight", "long"),
    Mutant("keys and values are overwritten while they are read", ROWS, WAIT + BOTH_THERE, WAIT, RACE, "long"),
    Mutant(
        "q and do are not waited for",
        ROWS,
        WAIT + "    sync_block();   // rows, list and tile are there\n",
        "    sync_block();   // rows, list and tile are there\n",
        "in flight",
        "long",
    ),
    Mutant(
        "q and do are read before they are there",
        ROWS,
        "    sync_block();   // rows, list and tile are there\n",
        "",
        RACE,
        "long",
    ),
    Mutant(
        "keys overwrite q and do before they are read",
        ROWS,
        "    sync_block();   // all warps have their rows, which keys overwrite\n",
        "",
        RACE,
        "long",
    ),
    Mutant("rows are not waited for", KEYS, "  " + WAIT + ROWS_THERE, ROWS_THERE, "in flight", "long"),
    Mutant("rows are overwritten while they are read", KEYS, "  " + WAIT + ROWS_THERE, "  " + WAIT, RACE, "long"),
    Mutant("the task is read before it is there", KEYS, "    sync_block();   // the task is there\n", "", RACE, "long"),
    Mutant(
        "warps leave one share",
        KEYS,
        "thread_index() / 32 / KEY_WARPS, dk[0], dv[0]",
        "0, dk[0], dv[0]",
        "threads of a block write",
        "short prefix",
    ),
    Mutant(
        "warps have the same rows",
        KEYS,
        "const int rows = thread / 32 / KEY_WARPS * WARP_ROWS;",
        "const int rows = 0;",
        "",
        "short prefix",
    ),
    Mutant("hidden keys are shown", KEYS, "ld_shared_int(place + lane / 4 * 4) != 0", "true", "", "padded"),
    Mutant(
        "scores by keys belong to other rows",
        BLOCK,
        "stats + (j * 8 + accumulator_column(thread_index() % 32)) * 8",
        "stats + j * 64",
        "",
        "long",
    ),
    *BACKWARD_BIAS_MUTANTS,
    without_weight(KEYS),
    Mutant(
        "sums of the bias's gradient do not begin at 0",
        KEYS,
        "st_shared(of_sum(copy, thread_index()), 0.0f);",
        ";",
        "nothing wrote",
        "bias",
    ),
    Mutant(
        "row warps share the bias's sums",
        KEYS,
        "SUMS + (copy * BLOCK_N + place) * 4",
        "SUMS + place * 4",
        "race",
        "bias",
    ),
]
