"""All experiments, found in the folder ``claims``, in the order in which the page has them."""

from __future__ import annotations

import pkgutil
from importlib import import_module

from benches.papers import claims
from benches.papers.experiment import Experiment

# Each claim's letter in the file names and its heading on the page.
CLAIMS = {
    "a": "One virtual token can say anything",
    "b": "A prefix is a bias",
    "c": "A prefix elicits, and cannot teach attention to aim anew",
    "d": "Where a prompt starts is where it ends",
    "e": "Equal loss, other extrapolation",
    "f": "What the introductions say",
    "g": "In-context learning and prefixes",
}


def experiments(names: list[str] | None = None) -> list[Experiment]:
    """The experiments of these names, or all.

    Raises:
        ValueError: a name that there is not; the message lists those that there are.
    """
    found = [import_module(f"{claims.__name__}.{m.name}").EXPERIMENT for m in pkgutil.iter_modules(claims.__path__)]
    found.sort(key=lambda x: (x.claim, x.name))
    known = [x.name for x in found]
    if wrong := sorted(set(names or ()) - set(known)):
        raise ValueError(f"--only: got {', '.join(wrong)}, expected {', '.join(known)}")
    return [x for x in found if not names or x.name in names]
