"""The results of a device suite as Markdown."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from benches.device_suite.suite_state import SuiteState
from fastprefix.measure.operator.baselines import NO_PREFIX
from fastprefix.measure.operator.candidates import OURS
from fastprefix.measure.report_tables import markdown_table, mebibytes, seconds

TITLES = {
    "backward": "Forward and backward",
    "lowest": "Forward and backward of the lowest trained layer: the prefix's gradients only",
    "forward": "Forward",
    "decode": "Decoding",
}


def markdown(suite: SuiteState) -> str:
    """The whole report: the machine, correctness, operator times, training steps, and rows that were not measured."""
    origin = suite.files["correctness"].environment
    facts = [f"torch {origin['torch']}", f"CUDA {origin['cuda']}" if origin["cuda"] else f"{origin['threads']} threads"]
    parts = [f"# {origin['device']}", ", ".join([*facts, origin["date"], f"{suite.spent:.0f} s in all"])]
    if suite.rows("correctness"):
        parts += ["## Correctness", _correctness(suite.rows("correctness"))]
    for mode, title in TITLES.items():
        for graphs in (False, True):
            rows = [r for r in suite.rows("operator") if r["mode"] == mode and r["graphs"] == graphs]
            if rows:
                parts += [f"## {title}{', as CUDA graphs' if graphs else ''}", _operator(rows)]
    if suite.rows("step"):
        parts += ["## Training step", _steps(suite.rows("step"))]
    notes = _notes(suite)
    if notes:
        parts += ["## Not measured", "\n".join(f"- {note}" for note in notes)]
    return "\n\n".join(parts) + "\n"


def _correctness(rows: list[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        verdicts = list(row["cases"].values())
        right = sum(v == "ok" for v in verdicts)
        other = sorted({f"{v} ({label})" for label, v in row["cases"].items() if v != "ok"})
        if right == 0 and len(set(verdicts)) == 1:
            other = verdicts[:1]
        how = "compiled" if row["compiled"] else "eager"
        lines.append((row["what"], row["backend"], row["dtype"], how, f"{right} of {len(verdicts)}", "; ".join(other)))
    return markdown_table(("what", "backend", "dtype", "", "right", "otherwise"), lines)


def _operator(rows: list[dict[str, Any]]) -> str:
    names = _ordered({name for row in rows for name in row["peers"]})
    lines = []
    for row in sorted(rows, key=lambda r: (-r["problem"]["H"], -r["problem"]["B"], r["problem"]["P"])):
        p = row["problem"]
        label = f"B{p['B']} H{p['H']}/{p['H_kv']} S{p['S']} T{p['T']} P{p['P']} D{p['D']} {p['dtype']}"
        times = {name: peer["median_s"] for name, peer in row["peers"].items()}
        cells = [_cell(row, name) for name in names]
        lines.append((label, f"{seconds(row['floor_s'])} ({row['bound']})", *cells, _against(times)))
    return markdown_table(("problem", "floor", *names, "strongest peer / ours"), lines)


def _cell(row: dict[str, Any], name: str) -> str:
    if name not in row["peers"]:
        failure = row["failures"].get(name, "")
        return failure.partition(":")[0] if failure.startswith(("wrong", "out of memory")) else "-"
    return _time_and_rate(row, row["peers"][name])


def _time_and_rate(row: dict[str, Any], found: dict[str, float]) -> str:
    """The median, and the bandwidth or arithmetic rate, whichever limits the roofline."""
    rate = f"{found['gb_s']:.0f} GB/s" if row["bound"] == "memory" else f"{found['tflop_s']:.3g} TFLOP/s"
    return f"{seconds(found['median_s'])}, {rate}"


def _against(times: dict[str, float]) -> str:
    """The time of the fastest exact baseline over that of our fastest backend."""
    ours = [t for name, t in times.items() if name.startswith(OURS)]
    others = {t: name for name, t in times.items() if not name.startswith(OURS) and name != NO_PREFIX}
    if not ours or not others:
        return "-"
    return f"{min(others) / min(ours):.2f} ({others[min(others)]})"


def _steps(rows: list[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        frozen = row["steps"].get("frozen")
        for name, step in row["steps"].items():
            over = f"{step['median_s'] / frozen['median_s']:.2f}x" if frozen else "-"
            peak = "-" if step["peak_bytes"] is None else mebibytes(step["peak_bytes"])
            shape = f"B{row['batch']} S{row['tokens']} P{row['num_virtual_tokens']}"
            floor = f"{seconds(row['floor_s'])} ({row['bound']})"
            saved = mebibytes(step["saved_bytes"])
            lines.append((shape, name, floor, _time_and_rate(row, step), over, saved, peak))
    head = ("step", "who", "floor", "median", "over frozen", "saved for backward", "peak above start")
    return markdown_table(head, lines)


def _notes(suite: SuiteState) -> list[str]:
    """Every reason once with the number of rows it left out, and the rows that the budget left out."""
    reasons: dict[str, int] = {}
    for row in [*suite.rows("operator"), *suite.rows("step")]:
        for name, reason in row["failures"].items():
            text = f"{name}: {reason}"
            reasons[text] = reasons.get(text, 0) + 1
    notes = [*suite.notes, *(f"{text} ({count} rows)" for text, count in sorted(reasons.items()))]
    if suite.dropped:
        notes.append(f"dropped for the budget of {suite.budget:.0f} s: " + "; ".join(suite.dropped))
    return notes


def _ordered(names: Iterable[str]) -> list[str]:
    """Names in the order of columns: ours first, the call without a prefix last."""
    return sorted(names, key=lambda name: (name == NO_PREFIX, not name.startswith(OURS), name))
