"""Kernels with one fault each, as replacements of text: what the emulator must find, and say by its name.

A fault is put into a copy of the sources. ``old`` stands there exactly once, or the list has fallen behind the kernels.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from tests.emulator.build import KERNELS, ROOT


@dataclass(frozen=True)
class Mutant:
    """``says``: a pattern of the emulator's message, or "" where only the numbers are wrong."""

    name: str
    file: str
    old: str
    new: str
    says: str

    def write(self) -> Path:
        """A folder with the mutated sources; the same one for the same text."""
        texts = {path.relative_to(KERNELS): path.read_text() for path in sorted(KERNELS.rglob("*.[ch]*"))}
        place = Path(self.file)
        found = texts[place].count(self.old)
        assert found == 1, f"{self.name}: {self.file} has its line {found} times: {self.old!r}"
        texts[place] = texts[place].replace(self.old, self.new)
        digest = hashlib.sha256(repr(sorted(texts.items())).encode()).hexdigest()[:16]
        folder = ROOT / "build/emulator/mutants" / digest
        for name, text in texts.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists() or path.read_text() != text:
                path.write_text(text)
        return folder

    def is_named_in(self, errors: list[str]) -> bool:
        return any(re.search(self.says, error) for error in errors)


ATTEND, COMBINE, BANK, PARAMS = (f"decode/{name}.cuh" for name in ("attend", "combine", "bank", "params"))

DECODE = [
    Mutant(
        "no wait for the tile's copies",
        ATTEND,
        "      cp_async_wait_group<0>();\n      // All threads'",
        "      // All threads'",
        "while an asynchronous copy|in flight",
    ),
    Mutant(
        "no barrier before a tile is read",
        ATTEND,
        "      sync_block();\n      if (i + 1 < share.end) load(i + 1);",
        "      if (i + 1 < share.end) load(i + 1);",
        "race|in flight",
    ),
    Mutant(
        "the next tile overwrites the one that is read",
        ATTEND,
        "const int stage = i % STAGES, first = first_key(i), end",
        "const int stage = 0, first = first_key(i), end",
        "race|in flight",
    ),
    Mutant(
        "the last tiles' copies are left in flight",
        ATTEND,
        "      if (i + 1 < share.end) load(i + 1);",
        "      if (i + 1 <= share.end) load(i + 1);",
        "in flight|race|outside",
    ),
    Mutant(
        "keys' lanes are those of values",
        ATTEND,
        "const int row = warp.n * KEYS + j * 16 + lane_row_by_columns(warp.lane);",
        "const int row = warp.n * KEYS + j * 16 + lane_row_by_rows(warp.lane);",
        "",
    ),
    Mutant(
        "states overwrite tiles that a warp still reads",
        ATTEND,
        "    sync_block();   // no warp reads tiles any more, and no copy is on its way\n",
        "",
        "race",
    ),
    Mutant(
        "states are merged before all are there",
        ATTEND,
        "    sync_block();\n    FP_NO_UNROLL\n    for (int i = thread_index(); i < BLOCK_M * (WIDTH / 4)",
        "    FP_NO_UNROLL\n    for (int i = thread_index(); i < BLOCK_M * (WIDTH / 4)",
        "race|nothing wrote",
    ),
    Mutant(
        "content's states overwrite the prefix's",
        PARAMS,
        "task.slot = p.plan.prefix_splits + task.split;",
        "task.slot = task.split;",
        "two blocks write|written twice|another block",
    ),
    Mutant(
        "a share that sees nothing leaves no state",
        ATTEND,
        "    leave(p, task, warp, state);\n  }\n",
        "    if (share.first < share.end) leave(p, task, warp, state);\n  }\n",
        "nothing wrote|no launch wrote|not written",
    ),
    Mutant(
        "rows without a prefix read its states",
        COMBINE,
        "return is_prefix(p.call, integer_at(ids, at)) ? 0 : p.plan.prefix_splits;",
        "return 0;",
        "nothing wrote|no launch wrote|not written",
    ),
    Mutant(
        "tiles that are none are not marked",
        BANK,
        "    for (int tile = tiles_before + thread_index(); tile < p.plan.prefix_tiles; tile += THREADS)\n"
        "      st_global(p.tiles + tile, BankTile{-1, 0, 0, 0});\n",
        "",
        "nothing wrote|no launch wrote|not written",
    ),
    Mutant(
        "no barrier inside the scan",
        BANK,
        "    sync_block();\n    for (int before = 0;",
        "    for (int before = 0;",
        "race|nothing wrote",
    ),
    Mutant(
        "the next prefixes' totals overwrite the last ones'",
        BANK,
        "      sync_block();   // before the next prefixes' totals overwrite these\n",
        "",
        "race",
    ),
    Mutant(
        "keys behind the end are read",
        ATTEND,
        "const bool inside = first + row + i * STEP < end;",
        "const bool inside = first + row + i * STEP < end + 1;",
        "outside|",
    ),
]
