"""PEFT's models against the same models patched, on SmolLM2-135M: ``python -m benches.peft``, minutes on two cores.

It also measures what a mixed batch of prefixes costs over one prefix. All figures are ratios of interleaved timings in
one process.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastprefix.machine.timing import interleaved, ratio
from fastprefix.measure.report_tables import markdown_table
from fastprefix.measure.training import peft_vs_patched
from fastprefix.measure.training.peft_vs_patched import ATTACHED, FROZEN, PATCHED, PEFT, Workload

Make = Callable[[Any], dict[str, Workload]]


def _ids(batch: int, tokens: int) -> Tensor:
    return torch.randint(5, 40000, (batch, tokens), generator=torch.Generator().manual_seed(0))


# Title, a function that builds the workloads, the pairs to divide, whether their saved bytes are of interest.
CASES: tuple[tuple[str, Make, tuple[tuple[str, str], ...], bool], ...] = (
    (
        "step, PREFIX_TUNING B8 S64 P512",
        lambda m: peft_vs_patched.prefix_steps(m, _ids(8, 64), 512),
        ((PEFT, PATCHED),),
        True,
    ),
    (
        "step, PROMPT_TUNING B16 S32 P100",
        lambda m: peft_vs_patched.prompt_steps(m, _ids(16, 32), 100),
        ((PEFT, PATCHED), (PEFT, ATTACHED)),
        True,
    ),
    (
        "32 tokens generated, PREFIX_TUNING B16 S16 P1024",
        lambda m: peft_vs_patched.generations(m, _ids(16, 16), 1024, 32),
        ((PEFT, PATCHED), (PATCHED, FROZEN)),
        False,
    ),
    *(
        (
            f"32 tokens generated, PREFIX_TUNING B{B} S16 P{P}",
            lambda m, B=B, P=P: peft_vs_patched.generations(m, _ids(B, 16), P, 32),  # type: ignore[misc]
            ((PEFT, PATCHED), (PEFT, ATTACHED), (ATTACHED, FROZEN)),
            False,
        )
        for B, P in ((1, 16), (1, 1024), (8, 1024))
    ),
    (
        "step, 8 prefixes of P128 mixed, B8 S64",
        lambda m: peft_vs_patched.mixed_steps(m, _ids(8, 64), 128),
        (("mixed", "one"),),
        True,
    ),
)


def take(model: Any, repeats: int) -> list[dict[str, Any]]:
    """Measure every case on a model and return the rows."""
    rows = []
    for title, make, pairs, saves in CASES:
        runs = make(model)
        saved = {name: run.saved_bytes() for name, run in runs.items()} if saves else {}
        timings = interleaved(runs, repeats, warmup=1)
        for first, second in pairs:
            row = {
                "title": title,
                "names": [first, second],
                "ratio": list(ratio(timings, first, second)),
                "saved": saved,
            }
            rows.append(row)
            print(row, flush=True)
        del runs
        gc.collect()
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    lines = []
    for row in rows:
        first, second = row["names"]
        median, low, high = row["ratio"]
        saved = [f"{row['saved'][name] / 2**20:.0f} MiB" if row["saved"] else "-" for name in (first, second)]
        what = f"{first} / {second}"
        lines.append((row["title"], what, f"{median:.2f}x ({low:.2f} to {high:.2f})", *saved))
    return markdown_table(("what", "of", "time", "saved: the first", "the second"), lines)


if __name__ == "__main__":
    from fastprefix.assets.smollm2 import load_smollm2

    print(table(take(load_smollm2()[0], repeats=5)))
