"""The demo's measurement: a training step with our prefix, with PEFT's prefix as shipped, and without a prefix."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from fastprefix.machine.text_table import text_table
from fastprefix.machine.timing import ratio
from fastprefix.measure.training.compare_steps import FROZEN, OURS, PEFT, build_steps, measure_steps

LENGTHS, ROWS, TOKENS = (16, 512), 8, 64
BUDGET, LEAST, MOST = 60.0, 3, 9  # seconds for timing one prefix length, and bounds on the rounds
TITLES = {PEFT: "PEFT as shipped", OURS: "fastprefix", FROZEN: "no prefix (P = 0)"}


@dataclass(frozen=True)
class Row:
    """One candidate at one prefix length; seconds are median and quartiles."""

    num_virtual_tokens: int
    name: str
    seconds: float
    low: float
    high: float
    times_frozen: float  # its time divided by the frozen model's, median over rounds
    saved_bytes: int
    rounds: int

    def to_json(self) -> dict[str, Any]:
        """The fields as plain data."""
        return asdict(self)


def compare(model: nn.Module, ids: Tensor, num_virtual_tokens: int) -> list[Row]:
    """Time the three steps alternately, on copies that share the model's weights; ``ids`` is ``[B, S]``."""
    steps = build_steps(model, ids, num_virtual_tokens, (PEFT, OURS, FROZEN))
    start = time.perf_counter()
    for step in steps.values():
        step()
    repeats = int(min(max(BUDGET / (time.perf_counter() - start), LEAST), MOST))
    results = measure_steps(steps, repeats, warmup=0)
    timings = {name: result.timing for name, result in results.items()}
    rows = []
    for name, result in results.items():
        low, high = result.timing.quartiles
        times = ratio(timings, name, FROZEN).median
        rows.append(Row(num_virtual_tokens, name, result.timing.median, low, high, times, result.saved_bytes, repeats))
    return rows


def table(rows: list[Row]) -> str:
    """A text table of time and memory, and of how much of each the prefix adds to the frozen model."""
    head = ("one training step", "P", "seconds", "(quartiles)", "over P = 0", "saved MiB", "over P = 0")
    lines = []
    for row in rows:
        base = next(r for r in rows if r.num_virtual_tokens == row.num_virtual_tokens and r.name == FROZEN)
        prefix = row.name != FROZEN
        lines.append(
            (
                TITLES[row.name],
                row.num_virtual_tokens if prefix else 0,
                f"{row.seconds:.2f}",
                f"{row.low:.2f} to {row.high:.2f}",
                f"{row.times_frozen:.2f}x" if prefix else "",
                f"{row.saved_bytes / 2**20:.0f}",
                f"{(row.saved_bytes - base.saved_bytes) / 2**20:+.0f}" if prefix else "",
            )
        )
    return text_table(head, lines)
