"""What every run of an experiment has to give, however short it was."""

from __future__ import annotations

from benches.papers.experiment import Experiment, Outcome, values_of


def check(experiment: Experiment, outcome: Outcome) -> dict[str, float]:
    """All rows are measured, in numbers; statements are judged, and the picture is drawn of two seeds."""
    assert set(outcome.measured) == {row.key for row in experiment.rows}
    assert all(value == value for value in outcome.measured.values())
    assert {type(s.holds(values_of([outcome, outcome]))) for s in experiment.statements} == {bool}
    drawn = experiment.draw([outcome, outcome])
    drawn.canvas.draw()
    assert drawn.axes
    return outcome.measured
