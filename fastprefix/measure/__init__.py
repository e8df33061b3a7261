"""Measuring: bytes saved for backward, times taken in turns, peers, floors, and whole training steps.

``step`` needs transformers and peft and is imported by name; everything here needs torch alone.
"""

from fastprefix.measure.floors import Cost, Peaks, cost, measure_peaks
from fastprefix.measure.peers import Peer, peers_for
from fastprefix.measure.problem import DTYPES, Leaves, Mode, Problem
from fastprefix.measure.run import Measured, measure, runner
from fastprefix.measure.saved import SavedBytes, saved_bytes
from fastprefix.measure.timing import Ratio, Timing, captured, interleaved, ratio

__all__ = [
    "DTYPES",
    "Cost",
    "Leaves",
    "Measured",
    "Mode",
    "Peaks",
    "Peer",
    "Problem",
    "Ratio",
    "SavedBytes",
    "Timing",
    "captured",
    "cost",
    "interleaved",
    "measure",
    "measure_peaks",
    "peers_for",
    "ratio",
    "runner",
    "saved_bytes",
]
