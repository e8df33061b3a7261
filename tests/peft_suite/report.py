"""What the runs say: a table by file, refusals, skips that were lifted, and what is worse with the patch."""

from __future__ import annotations

from collections import Counter
from typing import Any

from tests.peft_suite import unskipped
from tests.peft_suite.selection import FILES

Run = dict[str, Any]
OUTCOMES = ("passed", "skipped", "xfailed", "xpassed", "failed", "error", "missing")
_GOOD = ("passed", "xfailed", "xpassed")


def summary(plain: Run, patched: Run | None) -> dict[str, Any]:
    """All that is printed, as JSON holds it."""
    for run in (plain, patched) if patched else (plain,):
        for record in run["tests"].values():
            if record["outcome"] == "skipped":  # for another reason, after one that was lifted
                record["lifted"] = []
    tests = plain["tests"]
    ran = {name: record for name, record in tests.items() if not record.get("lifted")}
    after = patched["tests"] if patched else {}
    own = [name for name in tests if not unskipped.is_counterpart(name)]
    files = {file: _row([name for name in own if name.startswith(file)], tests, after) for file in FILES}
    for file, row in files.items():
        row["left_out"] = sum(name.startswith(file) for name in plain["left_out"])
    return {
        "files": files,
        "total": _total(list(files.values())),
        "of_other_configs": plain["others"],
        "left_out": plain["left_out"],
        "skips": dict(Counter(record["why"] for record in ran.values() if record["outcome"] == "skipped")),
        "fail_unpatched": {name: ran[name]["why"] for name in ran if ran[name]["outcome"] in ("failed", "error")},
        "refused": dict(Counter(why for record in after.values() for why in record.get("refused", {}))),
        "lifted": {limit: _limit(limit, tests, after) for limit in (*unskipped.LIMITS, unskipped.CHECKPOINTED)},
        "broken": plain["broken"] | (patched["broken"] if patched else {}),
        "worse": worse(tests, after) if patched else {},
    }


def worse(tests: dict[str, Any], after: dict[str, Any]) -> dict[str, str]:
    """Tests that do well as PEFT's and not with the patch, and why."""
    found = {}
    for name, record in tests.items():
        now = after.get(name, {"outcome": "missing"})
        if record["outcome"] in _GOOD and now["outcome"] not in _GOOD:
            found[name] = f"{now['outcome']}: {now.get('why', 'no report, the process died')}"
    return found


def _row(names: list[str], tests: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    row: dict[str, Any] = {"selected": len(names), "unpatched": _outcomes(names, tests)}
    if after:
        records = [after.get(name, {}) for name in names]
        row["patched"] = _outcomes(names, after)
        row["refused"] = sum(bool(record.get("refused")) for record in records)
        row["through_patch"] = sum(record.get("patched", 0) > 0 for record in records)
        row["with_operator"] = sum(record.get("operator", 0) > 0 for record in records)
        row["forwards"] = sum(record.get("forwards", 0) for record in records)
        row["worse"] = sum(name in worse({name: tests[name]}, after) for name in names)
    return row


def _outcomes(names: list[str], tests: dict[str, Any]) -> dict[str, int]:
    """A test whose skip was lifted is one that PEFT skips."""
    records = [tests.get(name, {"outcome": "missing"}) for name in names]
    counted = Counter("skipped" if record.get("lifted") else record["outcome"] for record in records)
    return {outcome: counted[outcome] for outcome in OUTCOMES if counted[outcome]}


def _total(rows: list[dict[str, Any]]) -> dict[str, Any]:
    total: dict[str, Any] = {}
    for row in rows:
        for key, value in row.items():
            if isinstance(value, dict):
                total[key] = dict(Counter(total.get(key, {})) + Counter(value))
            else:
                total[key] = total.get(key, 0) + value
    return total


def _limit(limit: str, tests: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    names = [name for name, record in tests.items() if limit in record.get("lifted", ())]
    row: dict[str, Any] = {"tests": len(names), "unpatched": sum(tests[name]["outcome"] in _GOOD for name in names)}
    if after:
        row["patched"] = sum(after.get(name, {}).get("outcome") in _GOOD for name in names)
        row["refused"] = sum(bool(after.get(name, {}).get("refused")) for name in names)
        row["with_operator"] = sum(after.get(name, {}).get("operator", 0) > 0 for name in names)
    for run, records in {"fail_unpatched": tests, "fail_patched": after}.items():
        row[run] = {name: records[name]["why"] for name in names if "why" in records.get(name, {})}
    return row


def text(content: dict[str, Any]) -> str:
    """The tables and lists, for a terminal."""
    both = "patched" in content["total"]
    columns = ["selected", "left out", "passed", "skipped", "xfail", "failed"]
    columns += ["| passed", "skipped", "xfail", "failed", "patched", "operator", "refused", "worse"] if both else []
    rows = [[name, *_cells(row, both)] for name, row in [*content["files"].items(), ("total", content["total"])]]
    lines = _table(["", *columns], rows)
    if both:
        lines += [
            "",
            "Right of the bar with the patch. patched: tests with a patched model; operator: tests in which the",
        ]
        lines += [f"operator ran with a prefix. Forward passes of patched models: {content['total']['forwards']}."]
    lines += ["", f"Tests of other PEFT methods in these files, not selected: {content['of_other_configs']}."]
    lines += _section("Left out, for nothing local stands in for what they ask", content["left_out"])
    lines += _section("Skipped by PEFT itself, with its reasons", content["skips"])
    lines += _section("Fail without the patch", content["fail_unpatched"])
    if both:
        lines += _section("Refused by fastprefix.patch and run as PEFT's own, tests by reason", content["refused"])
    lines += ["", "Skips of PEFT's lifted: tests that PEFT leaves out for what it cannot do"]
    heads = ["", "tests", "pass unpatched", *(["pass patched", "refused", "operator"] if both else [])]
    limits = [[name, *map(str, row.values())][: len(heads)] for name, row in content["lifted"].items()]
    lines += _table(heads, limits)
    if content["broken"]:
        lines += _section("NOT COLLECTED", content["broken"])
    if both:
        lines += _section("WORSE: pass without the patch and not with it", content["worse"])
    return "\n".join(lines)


def _cells(row: dict[str, Any], both: bool) -> list[str]:
    def counts(found: dict[str, int]) -> list[int]:
        bad = sum(found.get(outcome, 0) for outcome in ("failed", "error", "missing"))
        expected = found.get("xfailed", 0) + found.get("xpassed", 0)
        return [found.get("passed", 0), found.get("skipped", 0), expected, bad]

    cells: list[Any] = [row["selected"], row["left_out"], *counts(row["unpatched"])]
    if both:
        first, *rest = counts(row["patched"])
        cells += [f"| {first}", *rest, *(row[key] for key in ("through_patch", "with_operator", "refused", "worse"))]
    return [str(cell) for cell in cells]


def _table(heads: list[str], rows: list[list[str]]) -> list[str]:
    widths = [max(len(line[i]) for line in [heads, *rows]) for i in range(len(heads))]
    return [
        "  ".join(
            cell.ljust(width) if not i else cell.rjust(width) for i, (cell, width) in enumerate(zip(line, widths))
        )
        for line in [heads, *rows]
    ]


def _section(title: str, entries: dict[str, Any]) -> list[str]:
    lines = [f"  {key}: {' '.join(str(value).split())[:300]}" for key, value in entries.items()]
    return ["", f"{title}: {len(lines) or 'none'}", *lines]
