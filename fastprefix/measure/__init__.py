"""Measuring: bytes saved for backward, interleaved times, other implementations, lower bounds, whole training steps.

Three rooms: ``operator`` measures one attention call, ``training`` whole models, ``kernels`` the tiles of the Triton
kernels. The names below need torch alone; most of ``training`` needs transformers and is imported from its modules.
"""

from fastprefix.machine.timing import Ratio, Timing, captured, interleaved, ratio
from fastprefix.measure.operator.candidates import Candidate, candidates_for
from fastprefix.measure.operator.problem import DTYPES, Leaves, Mode, Problem
from fastprefix.measure.operator.roofline import Cost, Peaks, cost, measure_peaks
from fastprefix.measure.operator.runner import Measured, measure, runner
from fastprefix.measure.training.saved_bytes import SavedBytes, saved_bytes

# The command line and the result files call a candidate a peer; so do these two names.
Peer, peers_for = Candidate, candidates_for

__all__ = [
    "DTYPES",
    "Cost",
    "Leaves",
    "Measured",
    "Mode",
    "Peaks",
    "Peer",
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
    "peers_for",
    "ratio",
    "runner",
    "saved_bytes",
]
