"""HTML pages in one file: nothing from elsewhere, light and dark as the reader's system is, and readable on a phone.

What is passed as ``body`` is HTML. Texts of models, files and users go through :func:`html.escape` first, or through
:func:`table` and :func:`heat_map`, which escape them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1c; --paper: #ffffff; --faint: #6f6f6f; --line: #d8d8d8;
  --blue: #1f6fb2; --orange: #c25700; --card: #f6f7f9; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e6e6; --paper: #16181b; --faint: #9aa1a8; --line: #3a3f45; --blue: #6db3ee; --orange: #f0a05a;
    --card: #1f2226; } }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 46rem;
  margin: 2rem auto; padding: 0 1rem; overflow-wrap: break-word; }
h1 { line-height: 1.2; } h2 { margin-top: 2.4rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; } th, td { padding: .3rem .6rem; text-align: right;
  border-bottom: 1px solid var(--line); vertical-align: top; } th:first-child, td:first-child { text-align: left; }
svg { width: 100%; height: auto; } svg text { fill: var(--faint); font-size: 12px; }
.axis { stroke: var(--line); } .level { stroke: var(--faint); stroke-dasharray: 4 4; }
.curve { stroke: var(--blue); fill: none; stroke-width: 2; } .point { fill: var(--blue); }
dt { font-weight: 600; margin-top: .8rem; } dd { margin-left: 0; } pre { white-space: pre-wrap; margin: .3rem 0; }
.cell { fill: var(--blue); } .frame { fill: none; stroke: var(--line); }
.note { color: var(--faint); font-size: .9rem; }
"""
_MOST = 160  # columns of a heat map; more are averaged


def page(title: str, body: str, style: str = "") -> str:
    """A whole page.

    Args:
        title: in plain text; it is escaped.
        body: HTML.
        style: CSS in addition to the common one, whose colours are variables: ``--ink``, ``--paper``, ``--faint``,
            ``--line``, ``--card``, ``--blue`` and ``--orange``.
    """
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}{style}</style></head><body>{body}</body></html>\n"
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of plain texts, which scrolls sideways where it is wider than the screen."""
    first = "".join(f"<th>{escape(x)}</th>" for x in head)
    rest = "".join("<tr>" + "".join(f"<td>{escape(x)}</td>" for x in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{first}</tr></thead><tbody>{rest}</tbody></table></div>'


def heat_map(
    values: Sequence[Sequence[float]],
    label: str,
    rows: str,
    columns: str,
    *,
    most: float = 1.0,
    names: Sequence[str] | None = None,
) -> str:
    """A matrix of numbers from 0 to ``most`` as coloured cells, in both colour schemes; nan and None stay empty.

    Args:
        values: rows of numbers, the first at the top.
        label: what is shown, for readers that do not see it.
        rows: name of a row, such as ``"layer"``.
        columns: name of a column.
        most: the number of the fullest colour.
        names: of the columns, for the text that a pointer shows; default their numbers.

    More than 160 columns are averaged over neighbours.
    """
    width = max(map(len, values), default=0)
    step = max(1, -(-width // _MOST))
    count = -(-width // step)
    wide, left, top = max(4.0, min(26.0, 660.0 / max(count, 1))), 44.0, 6.0
    high = max(6.0, min(wide, 14.0))
    cells = []
    for i, row in enumerate(values):
        for j in range(0, len(row), step):
            some = [x for x in row[j : j + step] if x is not None and math.isfinite(x)]
            if not some:
                continue
            mean, last = sum(some) / len(some), min(j + step, len(row)) - 1
            column = names[j] if names is not None else str(j) if last == j else f"{j} to {last}"
            corner = left + j // step * wide, top + i * high
            strength = min(1.0, max(0.0, mean / most)) if most > 0 else 0.0
            cells.append(
                _cell(*corner, wide - 0.6, high - 0.6, strength, f"{rows} {i}, {columns} {column}: {mean:.3g}")
            )
    right, low = left + count * wide, top + len(values) * high
    frame = f'x="{left - 1}" y="{top - 1}" width="{count * wide + 1:.1f}" height="{low - top + 1:.1f}"'
    middle = (top + low) / 2.0
    texts = [
        f'<text x="{left - 6:.0f}" y="{top + (i + 0.5) * high + 4:.1f}" text-anchor="end">{i}</text>'
        for i in range(0, len(values), 1 if len(values) <= 6 else 5)
    ]
    texts.append(f'<text x="{left}" y="{low + 18:.0f}">{escape(columns)} 0 to {width - 1}</text>')
    texts.append(f'<text x="12" y="{middle:.0f}" transform="rotate(-90 12 {middle:.0f})">{escape(rows)}</text>')
    return (
        f'<svg viewBox="0 0 {right + 4:.0f} {low + 26:.0f}" style="max-width:{max(right + 4, 200):.0f}px" role="img" '
        f'aria-label="{escape(label)}"><rect class="frame" {frame}/>{"".join(cells)}{"".join(texts)}</svg>'
    )


def scale(most: float, text: str) -> str:
    """A line that says which colours the numbers of a :func:`heat_map` have."""
    cells = "".join(_cell(9.0 * i, 0.0, 9.0, 12.0, i / 9.0) for i in range(10))
    return (
        '<p class="note"><svg viewBox="0 0 90 12" style="width:90px;vertical-align:middle" aria-hidden="true">'
        f"{cells}</svg> 0 to {most:.3g}: {escape(text)}</p>"
    )


def _cell(x: float, y: float, width: float, height: float, strength: float, hint: str = "") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill-opacity="{strength:.3f}"'
    return f'<rect class="cell" {place}>{f"<title>{escape(hint)}</title>" if hint else ""}</rect>'
