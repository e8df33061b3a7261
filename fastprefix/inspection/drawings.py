"""The drawings of a report that are no heat maps: a text coloured token by token, and a map of slots."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import torch
from torch import Tensor

from fastprefix.analysis import SlotMap

STYLE = """
.text { line-height: 1.9; font-family: ui-monospace, monospace; font-size: .9rem; }
.text span { background: color-mix(in srgb, var(--blue) calc(var(--m) * 75%), transparent); padding: .15rem 0;
  white-space: pre-wrap; }
.around { fill: var(--faint); fill-opacity: .35; } .from { fill: none; stroke: var(--orange); stroke-width: 1.5; }
.move { stroke: var(--faint); stroke-width: 1; }
svg text.name { fill: var(--ink); font-size: 11px; }
"""
_SIDE, _EDGE = 640.0, 24.0


def coloured(tokens: Sequence[str], strengths: Sequence[float]) -> str:
    """A text whose tokens are the more coloured the larger their number from 0 to 1 is, which a pointer shows too."""
    spans = []
    for token, strength in zip(tokens, strengths, strict=True):
        shown = escape(token).replace("\n", "↵\n")
        spans.append(f'<span style="--m:{strength:.3f}" title="{strength:.2f}">{shown}</span>')
    return f'<p class="text">{"".join(spans)}</p>'


def slot_map(found: SlotMap, names: Sequence[str]) -> str:
    """The points around as dots, a ring where a slot started, a line, and a disc where the slot is.

    A text's first token is often far from all others. The frame is around the slots and the middle 90% of the dots, and
    a note counts the dots outside of it.
    """
    ends = found.around.quantile(torch.tensor([0.05, 0.95], dtype=found.around.dtype), dim=0)  # [2, 2]
    points = [x for x in (ends, found.end, found.start) if x is not None]
    low = [min(float(x[:, axis].min()) for x in points) for axis in (0, 1)]
    high = [max(float(x[:, axis].max()) for x in points) for axis in (0, 1)]
    spans = [max(b - a, 1e-30) for a, b in zip(low, high, strict=True)]
    tall = _SIDE * 0.7

    def place(point: Tensor) -> tuple[float, float]:
        x, y = ((float(point[axis]) - low[axis]) / spans[axis] for axis in (0, 1))
        return _EDGE + x * (_SIDE - 2 * _EDGE), tall - _EDGE - y * (tall - 2 * _EDGE)

    drawn, outside = [], 0
    for point in found.around:
        x, y = place(point)
        if not (0.0 < x < _SIDE and 0.0 < y < tall):
            outside += 1
            continue
        drawn.append(f'<circle class="around" cx="{x:.1f}" cy="{y:.1f}" r="2"/>')
    for i, point in enumerate(found.end):
        x, y = place(point)
        if found.start is not None:
            a, b = place(found.start[i])
            drawn.append(f'<line class="move" x1="{a:.1f}" y1="{b:.1f}" x2="{x:.1f}" y2="{y:.1f}"/>')
            drawn.append(f'<circle class="from" cx="{a:.1f}" cy="{b:.1f}" r="4"/>')
        drawn.append(
            f'<circle class="point" cx="{x:.1f}" cy="{y:.1f}" r="4"><title>{escape(names[i])}</title></circle>'
        )
        if len(found.end) <= 32:
            drawn.append(f'<text class="name" x="{x + 6:.1f}" y="{y + 4:.1f}">{i}</text>')
    note = f'<p class="note">{outside} of {len(found.around)} dots are outside of the frame.</p>' if outside else ""
    return (
        f'<svg viewBox="0 0 {_SIDE:.0f} {tall:.0f}" role="img" aria-label="slots in two dimensions">'
        f'<rect class="frame" x="1" y="1" width="{_SIDE - 2:.0f}" height="{tall - 2:.0f}"/>{"".join(drawn)}</svg>{note}'
    )
