"""The README's measured part: ``python -m benches.readme --measure`` on a quiet CPU, then ``python -m benches.readme``.

The first writes ``benches/results/cpu/readme.json`` (some minutes; SmolLM2-135M is among it), the second the README's
table from that file. Every line is a ratio or a count of bytes from one process.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benches import peft
from fastprefix.measure.operator.problem import Mode, Problem
from fastprefix.measure.operator.runner import measure
from fastprefix.measure.report_tables import environment, markdown_table, write_atomically
from fastprefix.measure.timing import Timing, ratio

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benches" / "results" / "cpu" / "readme.json"
BEGIN, END = "<!-- measured -->", "<!-- end of measured -->"
PARTS = ("operator", "step", "saved", "peft")
_NAMES = {
    "cat_mask": "cat, repeat_kv, dense mask (PEFT as shipped)",
    "cat_sdpa": "cat + SDPA, lower-right causal",
    "flex": "cat + FlexAttention, compiled",
    "cache_sdpa": "SDPA, prefix in every sample's cache",
    "cache_packed": "the same, heads of a group packed as rows",
    "content_only": "no prefix at all",
}
_OPERATOR: tuple[tuple[Mode, Problem], ...] = (
    ("backward", Problem.train(16, 12, 12, 128, 512, 64)),
    ("backward", Problem.train(8, 9, 3, 64, 512, 64)),
    ("backward", Problem.train(8, 9, 3, 64, 16, 64)),
    ("decode", Problem.decode(32, 9, 3, 16, 2048, 64)),
    ("decode", Problem.decode(32, 32, 8, 16, 8192, 128)),
    ("decode", Problem.decode(1, 9, 3, 16, 2048, 64)),
)


def take(parts: Sequence[str], repeats: int) -> dict[str, Any]:
    """Measure parts of what the README says."""
    found: dict[str, Any] = {"environment": environment("cpu"), "threads": torch.get_num_threads()}
    if "operator" in parts:
        found["operator"] = _operator(repeats)
    if "step" in parts:
        found["step"] = [_step(length) for length in (16, 512)]
    if "saved" in parts:
        found["saved"] = [_saved(batch) for batch in (1, 16)]
    if "peft" in parts:
        found["peft"] = peft.take(_model(), repeats=7)
    return found


def _operator(repeats: int) -> list[dict[str, Any]]:
    rows = []
    for mode, problem in _OPERATOR:
        done = measure(problem, mode, repeats=repeats, warmup=3)
        if done.wrong:
            raise AssertionError(f"{problem.label}: {done.failures}")
        peers = {name: list(ratio(done.timings, name, "ours")) for name in done.timings if name != "ours"}
        row = {"mode": mode, "label": problem.label, "ms": 1e3 * done.timings["ours"].median, "slower": peers}
        rows.append(row)
        print(row, flush=True)
    return rows


def _model() -> Any:
    from fastprefix.assets.smollm2 import load_smollm2

    return load_smollm2()[0]


def _step(length: int) -> dict[str, Any]:
    from fastprefix.measure.training.compare_steps import build_steps, measure_steps

    results = measure_steps(build_steps(_model(), torch.randint(5, 40000, (8, 64)), length), repeats=15)
    timings: dict[str, Timing] = {name: r.timing for name, r in results.items()}
    row = {
        "P": length,
        "seconds": {name: t.median for name, t in timings.items()},
        "peft_over_ours": list(ratio(timings, "peft", "ours")),
        "ours_over_frozen": list(ratio(timings, "ours", "frozen")),
        "saved": {name: r.saved_bytes for name, r in results.items()},
    }
    print(row, flush=True)
    return row


def _saved(batch: int) -> dict[str, Any]:
    """What 512 prefix tokens add to the bytes saved for backward, parameters not counted."""
    from fastprefix.measure.training.compare_steps import build_steps

    ids = torch.randint(5, 40000, (batch, 64))
    added = {}
    for name in ("ours", "peft"):
        steps = build_steps(_model(), ids, 512, ("frozen", name))
        added[name] = steps[name].saved_bytes() - steps["frozen"].saved_bytes()
        del steps
        gc.collect()
    print(batch, added, flush=True)
    return {"B": batch, **added}


def section(found: dict[str, Any]) -> str:
    """The README's text between its marks."""
    place = found["environment"]
    machine = f"{place['device']}, {found['threads']} threads, torch {place['torch']}, fp32, {place['date'][:10]}"
    rows = []
    for row in found["operator"]:
        what = "forward + backward" if row["mode"] == "backward" else row["mode"]
        for name, (median, low, high) in row["slower"].items():
            rows.append(
                (
                    f"{what}, {row['label'].removesuffix(' fp32')}",
                    _NAMES[name],
                    f"{median:.2f}x ({low:.2f} to {high:.2f})",
                )
            )
    steps = []
    for row in found["step"]:
        (p, *_), (f, *_) = row["peft_over_ours"], row["ours_over_frozen"]
        mib = {name: f"{n / 2**20:.0f} MiB" for name, n in row["saved"].items()}
        steps.append((row["P"], f"{p:.2f}x", f"{f:.2f}x", mib["ours"], mib["peft"], mib["frozen"]))
    extra = "; ".join(f"at B = {r['B']}: {_mib(r['ours'])}, PEFT {_mib(r['peft'])}" for r in found["saved"])
    return "\n".join(
        (
            f"On {machine}. Candidates in turns in one process: median of the ratios by round, and their quartiles.",
            "",
            "The operator, time of the peer over ours (below 1 the peer wins):",
            "",
            markdown_table(("call", "peer", "peer / ours"), rows),
            "",
            "A training step of SmolLM2-135M, B = 8, S = 64, and what it saves for backward, parameters not counted:",
            "",
            markdown_table(("P", "PEFT / ours", "ours / no prefix", "saved: ours", "PEFT", "no prefix"), steps),
            "",
            f"What P = 512 adds to the saved bytes: {extra}.",
            "",
            "PEFT's models as shipped beside the same ones patched, and a mixed batch beside one prefix, SmolLM2-135M:",
            "",
            peft.table(found["peft"]),
        )
    )


def _mib(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"


def fill(text: str) -> str:
    """The README with its measured part made anew from the results on disk."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{section(json.loads(RESULTS.read_text()))}\n{END}{rest.split(END)[1]}"


def main() -> None:
    """Measure on request, then write the README."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measure", nargs="*", metavar="PART", choices=PARTS, help="measure first; default all parts")
    parser.add_argument("--repeats", type=int, default=25, help="rounds of each operator row")
    args = parser.parse_args()
    if args.measure is not None:
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        before = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        found = {**before, **take(args.measure or PARTS, args.repeats)}
        write_atomically(RESULTS, json.dumps(found, indent=1) + "\n")
    readme = ROOT / "README.md"
    readme.write_text(fill(readme.read_text()))


if __name__ == "__main__":
    main()
