"""What the pictures of the small models share: colours that the colour-blind tell apart, and bars with a dot a seed."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#999999"


def bars(axes: Any, labels: Sequence[str], series: dict[str, tuple[str, Sequence[Sequence[float]]]]) -> None:
    """Groups of bars at the means over seeds, with a dot for each seed; of a series, its colour and its groups."""
    width = 0.8 / len(series)
    for i, (name, (colour, groups)) in enumerate(series.items()):
        places = [group + (i - (len(series) - 1) / 2) * width for group in range(len(groups))]
        kept = [(place, seeds) for place, seeds in zip(places, groups, strict=True) if seeds]
        means = [statistics.fmean(seeds) for _, seeds in kept]
        axes.bar([place for place, _ in kept], means, width * 0.94, color=colour, label=name)
        for place, seeds in kept:
            axes.plot([place] * len(seeds), seeds, "o", color="black", markersize=3)
            axes.text(place, max(seeds) + 2, f"{statistics.fmean(seeds):.0f}", ha="center", fontsize=8)
    axes.set_xticks(range(len(labels)), labels)


def curve(axes: Any, x: Sequence[float], seeds: Sequence[Sequence[float]], colour: str, label: str, mark: str) -> None:
    """A line through the means over seeds, and a bar from the lowest to the highest; ``seeds`` of each x."""
    means = [statistics.fmean(y) for y in seeds]
    down = [m - min(y) for m, y in zip(means, seeds, strict=True)]
    up = [max(y) - m for m, y in zip(means, seeds, strict=True)]
    axes.errorbar(x, means, [down, up], color=colour, label=label, marker=mark, capsize=3)
