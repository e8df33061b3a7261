"""Faults of decoding's kernels."""

from __future__ import annotations

from tests.cuda.emulated.mutants.mutant import Mutant

ATTEND, COMBINE, BANK, PARAMS = (f"decode/{name}.cuh" for name in ("attend", "combine", "bank", "params"))

DECODE_MUTANTS = [
    Mutant(
        "no wait for the tile's copies",
        ATTEND,
        "      cp_async_wait_group<0>();\n      // All threads'",
        "      // All threads'",
        "while an asynchronous copy|in flight",
        "shares",
    ),
    Mutant(
        "no barrier before a tile is read",
        ATTEND,
        "      sync_block();\n      if (i + 1 < share.end) load(i + 1);",
        "      if (i + 1 < share.end) load(i + 1);",
        "race|in flight",
        "shares",
    ),
    Mutant(
        "the next tile overwrites the one that is read",
        ATTEND,
        "const int stage = i % STAGES, first = first_key(i), end",
        "const int stage = 0, first = first_key(i), end",
        "race|in flight",
        "shares",
    ),
    Mutant(
        "the last tiles' copies are left in flight",
        ATTEND,
        "      if (i + 1 < share.end) load(i + 1);",
        "      if (i + 1 <= share.end) load(i + 1);",
        "in flight|race|outside",
        "shares",
    ),
    Mutant(
        "keys' lanes are those of values",
        ATTEND,
        "const int row = warp.n * KEYS + j * 16 + lane_row_by_columns(warp.lane);",
        "const int row = warp.n * KEYS + j * 16 + lane_row_by_rows(warp.lane);",
        "",
        "shares",
    ),
    Mutant(
        "states overwrite tiles that a warp still reads",
        ATTEND,
        "    sync_block();   // no warp reads tiles any more, and no copy is on its way\n",
        "",
        "race",
        "shares",
    ),
    Mutant(
        "states are merged before all are there",
        ATTEND,
        "    sync_block();\n    FP_NO_UNROLL\n    for (int i = thread_index(); i < BLOCK_M * (WIDTH / 4)",
        "    FP_NO_UNROLL\n    for (int i = thread_index(); i < BLOCK_M * (WIDTH / 4)",
        "race|nothing wrote",
        "shares",
    ),
    Mutant(
        "content's states overwrite the prefix's",
        PARAMS,
        "task.slot = p.plan.prefix_splits + task.split;",
        "task.slot = task.split;",
        "two blocks write|written twice|another block",
        "shares",
    ),
    Mutant(
        "a share that sees nothing leaves no state",
        ATTEND,
        "    leave(p, task, warp, state);\n  }\n",
        "    if (share.first < share.end) leave(p, task, warp, state);\n  }\n",
        "nothing wrote|no launch wrote|not written",
        "ragged bank",
    ),
    Mutant(
        "rows without a prefix read its states",
        COMBINE,
        "return is_prefix(p.call, integer_at(ids, at)) ? 0 : p.plan.prefix_splits;",
        "return 0;",
        "nothing wrote|no launch wrote|not written",
        "ragged bank",
    ),
    Mutant(
        "tiles that are none are not marked",
        BANK,
        "    for (int tile = tiles_before + thread_index(); tile < p.plan.prefix_tiles; tile += THREADS)\n"
        "      st_global(p.tiles + tile, BankTile{-1, 0, 0, 0});\n",
        "",
        "nothing wrote|no launch wrote|not written",
        "ragged bank",
    ),
    Mutant(
        "no barrier inside the scan",
        BANK,
        "    sync_block();\n    for (int before = 0;",
        "    for (int before = 0;",
        "race|nothing wrote",
        "large bank",
    ),
    Mutant(
        "the next prefixes' totals overwrite the last ones'",
        BANK,
        "      sync_block();   // before the next prefixes' totals overwrite these\n",
        "",
        "race",
        "large bank",
    ),
    Mutant(
        "keys behind the end are read",
        ATTEND,
        "const bool inside = first + row + i * STEP < end;",
        "const bool inside = first + row + i * STEP < end + 1;",
        "outside",
        "shares",
    ),
]
