"""What one experiment is: how it is run, what was published of it, and what would make its claim true.

A claim is judged by its statements, which are computed from what was measured. A sentence on the page that says "holds"
is therefore never older than the numbers beside it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Values = Mapping[str, Sequence[float]]  # of each row, one number a seed


@dataclass(frozen=True)
class Outcome:
    """What one run with one seed found."""

    measured: dict[str, float]  # by the key of a row
    drawn: dict[str, Any] = field(default_factory=dict)  # what else the picture needs; plain data for JSON


@dataclass(frozen=True)
class Row:
    """One number of an experiment, with what was published of it."""

    key: str
    label: str
    published: str = ""  # as it is printed; the setting may be another one, which ``Experiment.setting`` says
    form: str = "{:.1f}"  # of the mean, and of the spread over seeds
    tolerance: float = 0.0  # a later run agrees when its mean over seeds is no further away than this


@dataclass(frozen=True)
class Statement:
    """A part of a claim that is either true of the measured numbers or not."""

    text: str  # a whole sentence
    holds: Callable[[Values], bool]


@dataclass(frozen=True)
class Experiment:
    """One experiment of a paper in a size that two cores can run."""

    name: str  # of its files
    claim: str  # the heading that it stands under, a key of ``page.CLAIMS``
    title: str
    papers: str  # links, Markdown
    setting: str  # what is run here, and in what it is smaller than the paper's; whole sentences
    run: Callable[[int, bool], Outcome]  # of a seed, and whether the size is the paper's own (``--full``)
    rows: tuple[Row, ...]
    statements: tuple[Statement, ...]
    differs: str  # where the measured numbers differ from the published ones, and why
    against: str  # what speaks against the claim
    draw: Callable[[Sequence[Outcome]], Any]  # a ``matplotlib.figure.Figure`` of all seeds
    seeds: tuple[int, ...] = (0, 1, 2)
    minutes: float = 1.0  # of one core for one seed, about; the longest are started first
    full: str = ""  # what ``--full`` runs instead, and what that needs; empty where there is no such size


def values_of(outcomes: Sequence[Outcome]) -> dict[str, list[float]]:
    """The measured numbers of all seeds by row."""
    keys = dict.fromkeys(key for outcome in outcomes for key in outcome.measured)
    return {key: [outcome.measured[key] for outcome in outcomes if key in outcome.measured] for key in keys}


def mean(values: Values, key: str) -> float:
    """The mean over seeds of one row."""
    return statistics.fmean(values[key])
