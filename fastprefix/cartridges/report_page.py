"""The report as one HTML page, without anything from elsewhere, in light and dark."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from fastprefix.cartridges.report import FIRST, HEADINGS, NONE, START, WHOLE, Report
from fastprefix.machine import html_page
from fastprefix.machine.files import write_atomically

_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 720, 320, 56, 36


def write_page(path: Path, report: Report) -> None:
    """Write the page."""
    write_atomically(path, page(report))


def page(report: Report) -> str:
    """The report as HTML."""
    samples = "".join(
        "<dl>" + "".join(f"<dt>{escape(k)}</dt><dd><pre>{escape(v)}</pre></dd>" for k, v in sample.items()) + "</dl>"
        for sample in report.samples
    )
    counts = f"{sum(report.conversations)} conversations were trained on, and {report.heldout} others measured."
    return html_page.page(
        "Cartridge",
        f"<h1>A cartridge of {report.tokens:,} tokens for {escape(report.model)}</h1>"
        f"<p>{counts} {' '.join(map(escape, report.costs()))}</p>"
        f"{html_page.table(HEADINGS, report.rows())}"
        f"<h2>Held-out loss by step</h2>{curve(report)}"
        f"<h2>Greedy answers to held-out questions</h2>{samples}",
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
