"""Kernels with one fault each, as replacements of text: what the emulator must find, and say by its name.

A fault is put into a copy of the sources. ``old`` stands there exactly once, or the list has fallen behind the kernels.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.emulator.build import KERNELS, ROOT


@dataclass(frozen=True)
class Mutant:
    """``says``: a pattern of the emulator's message, "" where only the numbers are wrong; ``call``: where it shows."""

    name: str
    file: str
    old: str
    new: str
    says: str
    call: str

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


def each(mutants: Sequence[Mutant]) -> list[Any]:
    """Parameters: every eighth mutant, and the others where tests may take minutes."""
    return [
        pytest.param(mutant, id=mutant.name, marks=() if i % 8 == 0 else pytest.mark.exhaustive)
        for i, mutant in enumerate(mutants)
    ]
