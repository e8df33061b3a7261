"""The report as one HTML page, without anything from elsewhere, in light and dark."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from fastprefix.cartridges.report import FIRST, HEADINGS, NONE, START, WHOLE, Report
from fastprefix.machine.files import write_atomically

_STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1c; --paper: #ffffff; --faint: #8a8a8a; --line: #d8d8d8;
  --blue: #1f6fb2; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e6e6; --paper: #16181b; --faint: #8f959c; --line: #3a3f45; --blue: #6db3ee; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 46rem;
  margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; width: 100%; } th, td { padding: .3rem .6rem; text-align: right;
  border-bottom: 1px solid var(--line); } th:first-child, td:first-child { text-align: left; }
svg { width: 100%; height: auto; } svg text { fill: var(--faint); font-size: 12px; }
.axis { stroke: var(--line); } .level { stroke: var(--faint); stroke-dasharray: 4 4; }
.curve { stroke: var(--blue); fill: none; stroke-width: 2; } .point { fill: var(--blue); }
dt { font-weight: 600; margin-top: .8rem; } pre { white-space: pre-wrap; }
"""
_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 720, 320, 56, 36


def write_page(path: Path, report: Report) -> None:
    """Write the page."""
    write_atomically(path, page(report))


def page(report: Report) -> str:
    """The report as HTML."""
    head = "".join(f"<th>{escape(x)}</th>" for x in HEADINGS)
    rows = "".join("<tr>" + "".join(f"<td>{escape(x)}</td>" for x in row) + "</tr>" for row in report.rows())
    samples = "".join(
        "<dl>" + "".join(f"<dt>{escape(k)}</dt><dd><pre>{escape(v)}</pre></dd>" for k, v in sample.items()) + "</dl>"
        for sample in report.samples
    )
    counts = f"{sum(report.conversations)} conversations were trained on, and {report.heldout} others measured."
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Cartridge</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head><body>'
        f"<h1>A cartridge of {report.tokens:,} tokens for {escape(report.model)}</h1>"
        f"<p>{counts} {' '.join(map(escape, report.costs()))}</p>"
        f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
        f"<h2>Held-out loss by step</h2>{curve(report)}"
        f"<h2>Greedy answers to held-out questions</h2>{samples}</body></html>\n"
    )


def curve(report: Report) -> str:
    """The held-out loss by step as SVG, between the levels of no text and of the whole text."""
    start = report.losses.get(START) or report.losses[FIRST]
    points = [(0.0, start.loss)]
    points += [(entry["step"], entry["eval_loss"]) for entry in report.curve if "eval_loss" in entry]
    levels = {NONE: report.losses[NONE].loss, WHOLE: report.losses[WHOLE].loss}
    low, high = _span([*levels.values(), *(loss for _, loss in points)])
    last = max([step for step, _ in points], default=0.0) or 1.0

    def x(step: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - 12) * step / last

    def y(loss: float) -> float:
        return 12 + (_HEIGHT - _BOTTOM - 12) * (high - loss) / (high - low)

    lines = [f'<line class="axis" x1="{_LEFT}" x2="{_LEFT}" y1="12" y2="{_HEIGHT - _BOTTOM}"/>']
    for name, loss in levels.items():
        lines.append(f'<line class="level" x1="{_LEFT}" x2="{_WIDTH - 12}" y1="{y(loss):.1f}" y2="{y(loss):.1f}"/>')
        lines.append(f'<text x="{_WIDTH - 12}" y="{y(loss) - 4:.1f}" text-anchor="end">{name}</text>')
        lines.append(f'<text x="{_LEFT - 6}" y="{y(loss) + 4:.1f}" text-anchor="end">{loss:.2f}</text>')
    path = " ".join(f"{x(step):.1f},{y(loss):.1f}" for step, loss in points)
    lines.append(f'<polyline class="curve" points="{path}"/>')
    lines += [f'<circle class="point" cx="{x(s):.1f}" cy="{y(loss):.1f}" r="3"/>' for s, loss in points]
    for step in (0, last):
        lines.append(f'<text x="{x(step):.1f}" y="{_HEIGHT - 12}" text-anchor="middle">{step:g}</text>')
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="held-out loss by step">{"".join(lines)}</svg>'


def _span(losses: Sequence[float]) -> tuple[float, float]:
    low, high = min(losses), max(losses)
    return (low, high) if high > low else (low - 0.5, high + 0.5)
