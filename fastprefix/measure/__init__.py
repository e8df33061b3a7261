"""Measuring: bytes saved for backward, times taken in turns, peers, floors, and whole training steps.

``step`` needs transformers and peft and is imported by name; everything here needs torch alone.
"""

from fastprefix.measure.operator.candidates import Candidate, candidates_for
from fastprefix.measure.operator.problem import DTYPES, Leaves, Mode, Problem
from fastprefix.measure.operator.roofline import Cost, Peaks, cost, measure_peaks
from fastprefix.measure.operator.runner import Measured, measure, runner
from fastprefix.measure.timing import Ratio, Timing, captured, interleaved, ratio
from fastprefix.measure.training.saved_bytes import SavedBytes, saved_bytes

__all__ = [
    "DTYPES",
    "Cost",
    "Leaves",
    "Measured",
    "Mode",
    "Peaks",
    "Candidate",
    "Problem",
    "Ratio",
    "SavedBytes",
    "Timing",
    "captured",
    "cost",
    "interleaved",
    "measure",
    "measure_peaks",
    "candidates_for",
    "ratio",
    "runner",
    "saved_bytes",
]
