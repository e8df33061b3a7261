"""Rows as plain data."""

from __future__ import annotations

from typing import Any

from fastprefix.measure import Cost, Problem, Timing


def median(timing: Timing, least: Cost) -> dict[str, float]:
    """Seconds, and the rates at which the least that had to be done was done in the median."""
    low, high = timing.quartiles
    return {
        "median_s": timing.median,
        "q1_s": low,
        "q3_s": high,
        "best_s": timing.best,
        "n": len(timing.samples),
        "gb_s": least.bandwidth(timing.median),
        "tflop_s": least.rate(timing.median),
    }


def plain(problem: Problem) -> dict[str, Any]:
    """Sizes and dtype."""
    sizes = {name: getattr(problem, name) for name in ("B", "H", "H_kv", "S", "T", "P", "D", "causal")}
    return {**sizes, "dtype": problem.dtype_name}
