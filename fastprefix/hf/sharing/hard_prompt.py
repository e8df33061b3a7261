"""The result of a search for a hard prompt, and the file in which an interrupted search is kept."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from fastprefix.errors import fail
from fastprefix.machine.files import write_atomically


@dataclass
class HardPrompt:
    """The result of :func:`search_hard_prompt`.

    Attributes:
        ids: token ids ``[P]``.
        losses: the best loss so far, of the start and after each step: mean negative log-likelihood of labels, in nats.
        evaluated: how many prompts' losses were computed.
    """

    ids: list[int]
    losses: list[float] = field(default_factory=list)
    evaluated: int = 0

    @property
    def loss(self) -> float:
        """The loss of ``ids``."""
        return self.losses[-1]


def write_state(file: Path, search: str, found: HardPrompt) -> None:
    """Keep what a search, named by its arguments' digest, has found."""
    write_atomically(file, json.dumps({"search": search, **asdict(found)}) + "\n")


def read_state(file: Path, search: str) -> HardPrompt:
    """What the search had found; raises ValueError for a broken file, or one of another search."""
    try:
        held = json.loads(file.read_text())
        found = HardPrompt([int(i) for i in held["ids"]], [float(x) for x in held["losses"]], int(held["evaluated"]))
    except (KeyError, TypeError, ValueError) as error:
        got = f"{file}, which cannot be read ({error})"
        raise fail("state", got, "a file that a search has written, or none") from error
    if held.get("search") != search:
        raise fail("state", f"{file} of another search", "the file of a search with the same model and arguments")
    return found
