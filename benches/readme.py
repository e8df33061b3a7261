"""The measured tables of ``docs/benchmarks.md`` and ``README.md``, from results on disk.

``python -m benches.readme`` writes the tables and the picture of them (:mod:`benches.pictures`) from
``benches/results/cpu/readme.json``. ``python -m benches.readme --measure`` measures first, on a quiet CPU; it takes
some minutes and needs SmolLM2-135M. ``--measure operator --processor NAME`` keeps the operator's rows of a further
processor beside them. Every figure is a ratio or a count of bytes from one process.
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
from benches.pictures import RESULTS, ROOT, machine
from fastprefix.machine.files import write_atomically
from fastprefix.machine.timing import Timing, ratio
from fastprefix.measure.operator.problem import Mode, Problem
from fastprefix.measure.operator.runner import measure
from fastprefix.measure.report_tables import environment, markdown_table

README, BENCHMARKS = ROOT / "README.md", ROOT / "docs" / "benchmarks.md"
BEGIN, END = "<!-- measured: python -m benches.readme -->", "<!-- end of measured -->"
# Counts of bytes are the same on every machine; the other parts are times, which belong to the machine in the results.
COUNTED = ("saved", "lengths")
PARTS = ("operator", "step", "peft", *COUNTED)
LENGTHS = (16, 128, 256, 384, 512)
_NAMES = {
    "cat_mask": "cat, repeat_kv, dense mask (PEFT as shipped)",
    "cat_sdpa": "cat + SDPA, lower-right causal",
    "flex": "cat + FlexAttention, compiled",
    "cache_sdpa": "SDPA, prefix in every sample's cache",
    "cache_packed": "the same, heads of a group packed as rows",
    "content_only": "no prefix at all",
    "ours:aten": "this package by vendor kernels (`aten`)",
}
_MODES = {"backward": "forward + backward", "lowest": "the same in the lowest layer", "decode": "decode"}
_STEPS = ("ours", "peft", "frozen")
_OPERATOR: tuple[tuple[Mode, Problem], ...] = (
    ("backward", Problem.train(16, 12, 12, 128, 512, 64)),
    ("backward", Problem.train(8, 9, 3, 64, 512, 64)),
    ("backward", Problem.train(8, 9, 3, 64, 16, 64)),
    ("backward", Problem.train(2, 9, 3, 1024, 16, 64)),
    ("lowest", Problem.train(8, 9, 3, 64, 16, 64)),
    ("decode", Problem.decode(32, 9, 3, 16, 2048, 64)),
    ("decode", Problem.decode(32, 32, 8, 16, 8192, 128)),
    ("decode", Problem.decode(1, 9, 3, 16, 16, 64)),
    ("decode", Problem.decode(1, 9, 3, 16, 128, 64)),
    ("decode", Problem.decode(1, 9, 3, 16, 2048, 64)),
    ("decode", Problem.decode(1, 32, 8, 512, 2048, 128)),
)


def take(parts: Sequence[str], repeats: int) -> dict[str, Any]:
    """Measure parts of what the tables say."""
    found: dict[str, Any] = {}
    if set(parts) - set(COUNTED):
        found.update(environment=environment("cpu"), threads=torch.get_num_threads())
        found["instructions"] = torch.backends.cpu.get_cpu_capability()
    if "operator" in parts:
        found["operator"] = _operator(repeats)
    if "step" in parts:
        found["step"] = [_step(length) for length in (16, 512)]
    if "saved" in parts:
        found["saved"] = [_saved(batch) for batch in (1, 16)]
    if "lengths" in parts:
        found["lengths"] = [_length(length) for length in LENGTHS]
    if "peft" in parts:
        found["peft"] = peft.take(_model(), repeats=min(repeats, 7))
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


def _length(length: int) -> dict[str, Any]:
    """Bytes that a step saves for backward with so many prefix tokens, parameters not counted."""
    from fastprefix.measure.training.compare_steps import build_steps

    steps = build_steps(_model(), torch.randint(5, 40000, (8, 64)), length)
    row = {"P": length, **{name: step.saved_bytes() for name, step in steps.items()}}
    print(row, flush=True)
    del steps
    gc.collect()  # models of 135M parameters and what they saved do not fit beside each other
    return row


def summary(found: dict[str, Any]) -> str:
    """The README's few rows: what is gained, and what is lost."""
    step = {row["P"]: row for row in found["step"]}[512]
    patched = {row["title"]: row["ratio"][0] for row in found["peft"] if row["names"] == ["peft", "patched"]}
    decode = {
        row["label"].removesuffix(" fp32"): row["slower"]["cache_sdpa"][0]
        for row in found["operator"]
        if row["mode"] == "decode"
    }
    saved = {name: f"{count / 2**20:.0f} MiB" for name, count in step["saved"].items()}
    training = "training step of SmolLM2-135M, B = 8, S = 64, P = 512"
    cache = "prefix in every row's cache / fastprefix"
    rows = (
        (training, "PEFT / fastprefix", _times(step["peft_over_ours"][0])),
        (training, "fastprefix / no prefix", _times(step["ours_over_frozen"][0])),
        ("the same at P = 16", "PEFT / fastprefix", _times(found["step"][0]["peft_over_ours"][0])),
        ("PEFT's prefix tuning, same step", "as shipped / patched", _times(patched["step, PREFIX_TUNING B8 S64 P512"])),
        (
            "PEFT's prompt tuning, B = 16, S = 32, P = 100",
            "as shipped / patched",
            _times(patched["step, PROMPT_TUNING B16 S32 P100"]),
        ),
        ("attention of one new token, B = 32, P = 8192", cache, _times(decode["B32 H32/8 S1 T16 P8192 D128"])),
        ("attention of one new token, B = 1, P = 2048", cache, _times(decode["B1 H9/3 S1 T16 P2048 D64"])),
    )
    return "\n".join(
        (
            f"Measured on {machine(found)}. A ratio is the time of the first divided by the time of the second.",
            "",
            markdown_table(("what", "ratio of times", "median"), rows),
            "",
            f"The first step saves {saved['ours']} for the backward pass, parameters not counted. PEFT saves",
            f"{saved['peft']}, the model without a prefix {saved['frozen']}.",
        )
    )


def _operator_table(found: dict[str, Any]) -> str:
    rows = []
    for row in found["operator"]:
        what = _MODES[row["mode"]]
        for name, (median, low, high) in row["slower"].items():
            rows.append(
                (
                    f"{what}, {row['label'].removesuffix(' fp32')}",
                    _NAMES[name],
                    f"{median:.2f}x ({low:.2f} to {high:.2f})",
                )
            )
    return markdown_table(("call", "other way", "other / fastprefix"), rows)


def section(found: dict[str, Any], others: Sequence[dict[str, Any]] = ()) -> str:
    """Everything that was measured, for ``docs/benchmarks.md``; ``others``: the operator's rows of other processors."""
    further = [line for other in others for line in ("", f"On {machine(other)}:", "", _operator_table(other))]
    steps = []
    for row in found["step"]:
        (p, *_), (f, *_) = row["peft_over_ours"], row["ours_over_frozen"]
        mib = {name: f"{n / 2**20:.0f} MiB" for name, n in row["saved"].items()}
        steps.append((row["P"], f"{p:.2f}x", f"{f:.2f}x", mib["ours"], mib["peft"], mib["frozen"]))
    lengths = [(row["P"], *(f"{row[name] / 2**20:.0f} MiB" for name in _STEPS)) for row in found["lengths"]]
    extra = "; ".join(f"at B = {r['B']}: {_mib(r['ours'])}, PEFT {_mib(r['peft'])}" for r in found["saved"])
    return "\n".join(
        (
            f"Measured on {machine(found)}. The candidates take turns within one process. A ratio is the median over",
            "the rounds, followed by its quartiles.",
            "",
            "### The operator",
            "",
            "Time of the other way divided by the time of `prefix_attention`. Below 1 the other way is faster.",
            "",
            _operator_table(found),
            *further,
            "",
            "### A training step",
            "",
            "SmolLM2-135M, B = 8, S = 64: times, and the bytes that autograd saves for the backward pass, parameters",
            "not counted.",
            "",
            markdown_table(
                ("P", "PEFT / fastprefix", "fastprefix / no prefix", "saved: fastprefix", "PEFT", "no prefix"), steps
            ),
            "",
            "The saved bytes of the same step at more prefix lengths. They are counted, not timed, so they are",
            "the same on every machine:",
            "",
            markdown_table(("P", "fastprefix", "PEFT", "no prefix"), lengths),
            "",
            f"What P = 512 adds to the saved bytes: {extra}.",
            "",
            "### PEFT's models, patched",
            "",
            "SmolLM2-135M: PEFT's models as shipped compared with the same models patched, and a batch of mixed",
            "prefixes compared with a batch that reads one prefix.",
            "",
            peft.table(found["peft"]),
        )
    )


def _times(ratio: float) -> str:
    return f"{ratio:.2f}x"


def _mib(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"


def fill(text: str, made: str, begin: str = BEGIN) -> str:
    """A page whose measured part is replaced by this one."""
    before, rest = text.split(begin)
    return f"{before}{begin}\n\n{made}\n\n{END}{rest.split(END)[1]}"


def pages() -> dict[Path, str]:
    """The pages with measured parts, as they ought to be from the results on disk."""
    found = json.loads(RESULTS.read_text())
    others = [json.loads(path.read_text()) for path in sorted(RESULTS.parent.glob("operator-*.json"))]
    return {
        README: fill(README.read_text(), summary(found)),
        BENCHMARKS: fill(BENCHMARKS.read_text(), section(found, others)),
    }


def main() -> None:
    """Measure on request, then write the tables and the picture."""
    from benches import pictures

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measure", nargs="*", metavar="PART", choices=PARTS, help="measure first; default all parts")
    parser.add_argument("--repeats", type=int, default=25, help="rounds of an operator's row; of PEFT's up to 7")
    parser.add_argument("--processor", metavar="NAME", help="keep the operator's rows as those of a further processor")
    args = parser.parse_args()
    if args.processor is not None and args.measure != ["operator"]:
        parser.error("--processor keeps the operator's rows: it goes with --measure operator")
    if args.measure is not None:
        results = RESULTS if args.processor is None else RESULTS.with_name(f"operator-{args.processor}.json")
        results.parent.mkdir(parents=True, exist_ok=True)
        before = json.loads(results.read_text()) if results.exists() else {}
        found = {**before, **take(args.measure or PARTS, args.repeats)}
        write_atomically(results, json.dumps(found, indent=1) + "\n")
    for path, text in pages().items():
        path.write_text(text)
    pictures.write()


if __name__ == "__main__":
    main()
