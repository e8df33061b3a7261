"""The demo's plot: the loss and, if they were measured, step times and saved bytes."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from fastprefix.demo.compare import LENGTHS, ROWS, TITLES, TOKENS, Row
from fastprefix.measure.report_tables import environment
from fastprefix.measure.training.compare_steps import FROZEN, OURS, PEFT

GREEN, GREY = "#1b7a5a", "#9aa0a6"
COLOURS = {PEFT: "#d95f02", OURS: GREEN, FROZEN: GREY}
HELDOUT = {
    "without": ("without prefix", GREY),
    "untrained": ("untrained prefix", "#7570b3"),
    "trained": ("trained", GREEN),
}


def plot(path: Path, losses: list[float], heldout: dict[str, float], rows: list[Row]) -> None:
    """Write a PNG with one panel, or with three if ``rows`` is not empty."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = 3 if rows else 1
    figure = Figure(figsize=(4.6 * panels + 0.4, 4.6), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, panels, squeeze=False)[0]
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
    _losses(axes[0], losses, heldout)
    if rows:
        _bars(axes[1], rows, "seconds")
        _bars(axes[2], rows, "saved_bytes")
        axes[1].set_title("seconds a training step (median, quartiles)", fontsize=11)
        axes[2].set_title("MiB saved for backward", fontsize=11)
        figure.legend(*axes[1].get_legend_handles_labels(), loc="outside lower right", ncols=3, frameon=False)
        where = environment("cpu")
        about = f"SmolLM2-135M, fp32, {ROWS} x {TOKENS} tokens a step; {where['device']}, {where['threads']} threads"
        figure.suptitle(about, fontsize=9, color="#5f6368")
    data = io.BytesIO()
    figure.savefig(data, format="png")
    path.write_bytes(data.getvalue())


def _losses(ax: Any, losses: list[float], heldout: dict[str, float]) -> None:
    ax.plot(range(1, len(losses) + 1), losses, color=GREEN, alpha=0.45, linewidth=1.5, label="training batch")
    for name, value in heldout.items():
        title, colour = HELDOUT[name]
        ax.axhline(value, color=colour, linestyle="--", linewidth=1.3, label=f"held out, {title}: {value:.2f}")
    low, high = ax.get_ylim()
    ax.set_ylim(low, high + 0.5 * (high - low))
    ax.legend(frameon=False, fontsize=9, loc="upper right")
    ax.set_xlabel("step")
    ax.set_title("loss of a gloss token", fontsize=11)
    ax.margins(x=0.02)


def _bars(ax: Any, rows: list[Row], what: str) -> None:
    tops = []
    for i, name in enumerate((PEFT, OURS, FROZEN)):
        mine = [r for r in rows if r.name == name]
        at = [LENGTHS.index(r.num_virtual_tokens) + (i - 1) * 0.27 for r in mine]
        if what == "seconds":
            values, form = [r.seconds for r in mine], "{:.2f}"
            spread = [[r.seconds - r.low for r in mine], [r.high - r.seconds for r in mine]]
            tops += [r.high for r in mine]
        else:
            values, form, spread = [r.saved_bytes / 2**20 for r in mine], "{:.0f}", None
            tops += values
        style = {"ecolor": "#3c4043", "error_kw": {"linewidth": 1.0}, "capsize": 2.0}
        bars = ax.bar(at, values, 0.25, color=COLOURS[name], label=TITLES[name], yerr=spread, **style)
        ax.bar_label(bars, [form.format(v) for v in values], fontsize=9, padding=3)
    ax.set_xticks(range(len(LENGTHS)), [f"P = {p}" for p in LENGTHS])
    ax.set_ylim(0, max(tops) * 1.12)
