"""Whether a later run says the same as the kept one: each mean within its row's tolerance, each statement as it was."""

from __future__ import annotations

import math

from benches.papers.experiment import Experiment, mean, values_of
from benches.papers.runner import Found, rounded


def disagreements(experiment: Experiment, kept: Found, later: Found) -> list[str]:
    """A sentence for each row and each statement in which two runs differ; none if they agree."""
    # What is kept was rounded, so the later run is compared as it would be kept.
    before, after = values_of(kept.outcomes), rounded(values_of(later.outcomes))
    said = []
    for row in experiment.rows:
        if row.key not in before or row.key not in after:
            said.append(f"{row.label}: only one of the runs has it")
            continue
        old, new = mean(before, row.key), mean(after, row.key)
        if math.isnan(new) or abs(new - old) > row.tolerance:
            said.append(f"{row.label}: {new:g} is further than {row.tolerance:g} from {old:g}")
    for statement in experiment.statements:
        if set(before) != set(after):
            break  # which the rows have said
        if statement.holds(before) != statement.holds(after):
            said.append(f"{statement.text} This was {statement.holds(before)}, and is {statement.holds(after)}.")
    return said
