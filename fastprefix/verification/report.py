"""A table of verdicts for people: which route is right where, and which is the fastest."""

from __future__ import annotations

from collections.abc import Iterable

from ..machine.text_table import text_table
from .cells import Cell
from .table import Table, Verdict

TITLES = {"driver": "driver", "threads": "threads", "torch": "torch", "triton": "Triton", "cuda": "CUDA library"}
ORDER = ("wrong", "failed", "crashed", "hung", "refused")


def text(table: Table) -> str:
    """Who the device is, a line for each route and direction, what is wrong, and the fastest by bucket."""
    about = table.identity
    facts = [about["device"], about["capability"]]
    facts += [f"{title} {about[name]}" for name, title in TITLES.items() if about[name]]
    parts = [", ".join(fact for fact in facts if fact), _verdicts(table)]
    if wrong := list(_wrong(table)):
        parts.append("\n".join(wrong))
    if table.times:
        parts.append(_times(table))
    return "\n\n".join(parts)


def _verdicts(table: Table) -> str:
    """A line for each route and direction: cells by result, and the worst error of those that are right."""
    groups: dict[tuple[str, str], list[tuple[Cell, Verdict]]] = {}
    for cell, found in table.verdicts.items():
        for route, verdict in found.items():
            groups.setdefault((route, cell.direction), []).append((cell, verdict))
    rows = []
    for (route, direction), members in sorted(groups.items()):
        right = [verdict for _, verdict in members if verdict.result == "right"]
        counts = [sum(verdict.result == name for _, verdict in members) for name in ORDER]
        worst = f"{max(verdict.worst or 0.0 for verdict in right):.2f}" if right else "-"
        dtypes = sorted({cell.dtype for cell, verdict in members if verdict.result == "right"})
        rows.append((route, direction, len(right), *(n or "-" for n in counts), worst, " ".join(dtypes) or "-"))
    return text_table(("route", "direction", "right", *ORDER, "worst error", "right in"), rows)


def _wrong(table: Table) -> Iterable[str]:
    for place, found in (*table.verdicts.items(), *table.failures.items()):
        for route, verdict in found.items():
            if verdict.result not in ("right", "refused"):
                yield f"{route} {verdict.result} on {place}: {verdict.detail}"


def _times(table: Table) -> str:
    """The fastest route of each bucket, and how many times slower the next and the reference are."""
    rows = []
    for bucket, times in sorted(table.times.items()):
        (best, seconds), *others = sorted(times.items(), key=lambda item: item[1])
        following = f"{others[0][1] / seconds:.2f}x {others[0][0]}" if others else "-"
        reference = f"{times['reference'] / seconds:.1f}x" if "reference" in times else "-"
        rows.append((str(bucket), best, f"{seconds * 1e3:.3g} ms", following, reference))
    return text_table(("timed call", "fastest", "median", "the next", "reference"), rows)
