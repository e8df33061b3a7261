"""``Report``: what making a cartridge cost, and how well it stands for its text."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastprefix.cartridges.measure import Measured
from fastprefix.machine.files import write_atomically
from fastprefix.machine.text_table import text_table

NONE, FIRST, START = "no text", "the text's first tokens", "start: Attention Matching"
TRAINED, COMPOSED, WHOLE = "trained cartridge", "trained, with all others", "whole text"


@dataclass
class Report:
    """The held-out losses of a run, and its costs in seconds by the clock and of the processor."""

    model: str
    tokens: int  # of a cartridge
    text_tokens: list[int]  # of each document
    conversations: list[int]  # that each was trained on
    heldout: int  # conversations that were measured
    losses: dict[str, Measured]
    bytes: list[tuple[int, int]]  # keys and values of each document, and of its cartridge
    start_seconds: float = 0.0  # with reading the texts
    start_cpu: float = 0.0
    prepared_seconds: float = 0.0  # everything before training
    prepared_cpu: float = 0.0
    seconds: float = 0.0  # training
    cpu: float = 0.0
    steps: int = 0
    curve: list[dict[str, float]] = field(default_factory=list)
    samples: list[dict[str, str]] = field(default_factory=list)

    def closed(self, name: str) -> float | None:
        """The share of the gap in held-out loss from no text to the whole text that is closed; None without a gap."""
        none, whole = self.losses[NONE].loss, self.losses[WHOLE].loss
        return None if none <= whole else (none - self.losses[name].loss) / (none - whole)

    def rows(self) -> list[list[str]]:
        """The table of losses, the whole text last."""
        names = [name for name in self.losses if name != WHOLE] + [WHOLE]
        found = []
        for name in names:
            loss, closed = self.losses[name], self.closed(name)
            share = "" if closed is None else f"{closed:.0%}"
            found.append([name, f"{loss.loss:.4f}", share, f"{loss.divergence:.4f}", f"{loss.agreement:.1%}"])
        return found

    def text(self) -> str:
        """The report in lines for a terminal."""
        table = text_table(HEADINGS, self.rows())
        return "\n".join([table, *self.costs()])

    def costs(self) -> list[str]:
        """Sizes and times in sentences."""
        kept = [f"{_mib(text)} of keys and values become {_mib(own)}" for text, own in self.bytes]
        lengths = [f"{length:,} tokens become {self.tokens:,}" for length in self.text_tokens]
        return [
            *(f"{a}: {b}." for a, b in zip(lengths, kept, strict=True)),
            f"The start took {self.start_seconds:.0f} s ({self.start_cpu:.0f} s of processors), all before training "
            f"{self.prepared_seconds:.0f} s ({self.prepared_cpu:.0f} s), training {self.steps} steps "
            f"{self.seconds:.0f} s ({self.cpu:.0f} s).",
        ]

    def write(self, path: Path) -> None:
        """Write the numbers as JSON."""
        write_atomically(path, json.dumps(dataclasses.asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> Report:
        """The report that :meth:`write` wrote."""
        given: dict[str, Any] = json.loads(path.read_text())
        given["losses"] = {name: Measured(**fields) for name, fields in given["losses"].items()}
        given["bytes"] = [tuple(pair) for pair in given["bytes"]]
        return cls(**given)


HEADINGS = ["read in front", "held-out loss", "gap closed", "KL to whole text", "same next token"]


def _mib(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB"
