"""Plot the losses of a training run by step."""

from __future__ import annotations

import io
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

PICTURE = "loss.png"


def write(folder: Path, history: Sequence[dict[str, Any]]) -> str:
    """Plot the losses that a Trainer logged to ``loss.png``; returns a line with the file, or why there is none."""
    if find_spec("matplotlib") is None:
        return f"no {PICTURE}: matplotlib is not installed (pip install matplotlib)"
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for key, label, style in (("loss", "training", "-"), ("eval_loss", "held-out", "o--")):
        points = sorted({(entry["step"], float(entry[key])) for entry in history if key in entry})
        if points:
            axes.plot(*zip(*points), style, label=label, linewidth=1.5, markersize=4)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("step")
    axes.set_ylabel("loss of a token")
    axes.legend(frameon=False)
    data = io.BytesIO()
    figure.savefig(data, format="png")
    (folder / PICTURE).write_bytes(data.getvalue())
    return f"the losses by step: {folder / PICTURE}"
