"""``docs/images/time_and_memory.svg``, drawn from the measured results: ``python -m benches.readme`` writes it.

The picture has a transparent background and grey text, so that it can be read on a light and on a dark page.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benches" / "results" / "cpu" / "readme.json"
PICTURE = ROOT / "docs" / "images" / "time_and_memory.svg"
COLOURS = {"peft": "#d9772b", "ours": "#2b83ba", "frozen": "#8a8a8a"}
LABELS = {"peft": "PEFT", "ours": "fastprefix", "frozen": "no prefix"}
GREY = "#808080"


def machine(found: dict[str, Any]) -> str:
    """Where and when it was measured, in a line."""
    place = found["environment"]
    device = place["device"] + (f" ({found['instructions']})" if "instructions" in found else "")
    return f"{device}, {found['threads']} threads, torch {place['torch']}, fp32, {place['date'][:10]}"


def series(found: dict[str, Any]) -> dict[str, dict[str, dict[int, float]]]:
    """What is drawn: seconds of a step, and MiB saved for its backward pass, by candidate and prefix length P."""
    return {
        "time": {name: {row["P"]: row["seconds"][name] for row in found["step"]} for name in LABELS},
        "memory": {name: {row["P"]: row[name] / 2**20 for row in found["lengths"]} for name in LABELS},
    }


def draw(found: dict[str, Any]) -> str:
    """The picture as SVG, the same text for the same results."""
    drawn = series(found)

    def plot(panels: Any) -> None:
        time, memory = panels
        lengths = list(drawn["time"]["ours"])
        for place, (name, points) in enumerate(drawn["time"].items()):
            at = [i + 0.26 * (place - 1) for i in range(len(lengths))]
            bars = time.bar(at, list(points.values()), 0.24, color=COLOURS[name], label=LABELS[name])
            time.bar_label(bars, fmt="%.1f", padding=1, color=GREY, fontsize=8)
        time.set_xticks(range(len(lengths)), [f"P = {length}" for length in lengths])
        time.set_title("seconds of a training step", color=GREY, fontsize=10)
        time.margins(y=0.12)
        for name, points in drawn["memory"].items():
            style = {"linestyle": "--", "zorder": 3} if name == "frozen" else {"marker": "o", "markersize": 4}
            memory.plot(list(points), list(points.values()), color=COLOURS[name], label=LABELS[name], **style)
        memory.set_title("MiB saved for the backward pass", color=GREY, fontsize=10)
        memory.set_xlabel("prefix tokens P", color=GREY)
        memory.set_ylim(bottom=0)
        memory.legend(frameon=False, labelcolor=GREY, fontsize=9, loc="lower right")

    return panels_as_svg(plot, f"SmolLM2-135M, B = 8, S = 64; {machine(found)}")


def panels_as_svg(plot: Callable[[Any], None], caption: str) -> str:
    """Two panels side by side, drawn by ``plot``, as SVG."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    options = {"svg.hashsalt": "fastprefix", "svg.fonttype": "none", "font.family": "DejaVu Sans", "font.size": 10}
    with matplotlib.rc_context(options):
        figure = Figure(figsize=(7.6, 2.9), layout="constrained")
        FigureCanvasSVG(figure)
        panels = figure.subplots(1, 2)
        plot(panels)
        for axes in panels:
            axes.patch.set_alpha(0)
            axes.tick_params(colors=GREY)
            axes.spines[["top", "right"]].set_visible(False)
            axes.spines[["left", "bottom"]].set_color(GREY)
        figure.supxlabel(caption, color=GREY, fontsize=8)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = re.sub(r"font-family: [^;]*;", "font-family: sans-serif;", out.getvalue())
    # Coordinates to a tenth of a point: smaller, and the same whatever the last bits of a layout are. Text stays.
    return re.sub(r"<[^>]*>", lambda tag: re.sub(r"(\d+\.\d)\d+", r"\1", tag[0]), text)


def write(path: Path = PICTURE) -> None:
    """Draw the results on disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(draw(json.loads(RESULTS.read_text())))


if __name__ == "__main__":
    write()
