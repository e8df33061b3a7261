"""The results of one device: rows on disk as they come, what was running, and how much of the budget is left."""

from __future__ import annotations

import json
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

from benches.plan import PARTS, Part
from fastprefix.measure.report_tables import ResultFile, environment, slug, write_atomically


class Suite:
    """Rows by part in ``<out>/<device>/<part>.json``, and beside them what a later process needs to go on.

    Args:
        out: folder of all devices.
        device: as torch names it.
        budget: seconds for the whole suite, earlier runs that are resumed included.
        resume: keep rows that are there. What ran when two earlier processes ended is blamed for it and skipped.
        only: the parts that run; rows of the others are kept.
    """

    def __init__(self, out: Path, device: str, budget: float, resume: bool, only: Collection[Part] = PARTS) -> None:
        self.device, self.budget = device, budget
        origin = environment(device)
        self.folder = out / slug(origin["device"])
        self.files = {
            part: ResultFile(self.folder / f"{part}.json", origin, resume or part not in only) for part in PARTS
        }
        self._state_path = self.folder / ".state.json"
        self._state: dict[str, Any] = {"spent_s": 0.0, "running": None, "interrupted": [], "blamed": {}}
        if resume and self._state_path.exists():
            self._state.update(json.loads(self._state_path.read_text()))
        self._start = time.monotonic() - float(self._state["spent_s"])
        self.dropped: list[str] = []  # keys of the rows that the budget did not reach
        self.notes: list[str] = []
        self._look_back()
        for part in only:
            self.files[part].write()

    @property
    def spent(self) -> float:
        """Seconds since the suite began."""
        return time.monotonic() - self._start

    @property
    def out_of_budget(self) -> bool:
        """Whether no further row may begin."""
        return self.spent > self.budget

    def done(self, part: Part, key: str) -> bool:
        """Whether the row is there already."""
        return key in self.files[part]

    def blamed(self, key: str) -> dict[str, str]:
        """Who may not run in this row again, and why."""
        return dict(self._state["blamed"].get(key, {}))

    def begin(self, key: str, who: str) -> None:
        """Note what runs, so that a process that never comes back is explained by the next."""
        self._state["running"] = [key, who]
        self._save()

    def end(self) -> None:
        """What ran came back."""
        self._state["running"] = None
        self._save()

    def blame(self, key: str, who: str, reason: str) -> None:
        """Do not run ``who`` in this row again."""
        self._state["blamed"].setdefault(key, {})[who] = reason
        self.end()

    def add(self, part: Part, row: dict[str, Any]) -> None:
        """A finished row."""
        self.files[part].add(row)
        self.end()

    def rows(self, part: Part) -> list[dict[str, Any]]:
        """The rows of a part so far."""
        return self.files[part].rows

    def finish(self) -> None:
        """Nothing is left to go on with."""
        self._state_path.unlink(missing_ok=True)

    def _look_back(self) -> None:
        """Once may have been anybody's doing; what was running both times is to blame."""
        running = self._state["running"]
        if running is None:
            return
        if running in self._state["interrupted"]:
            key, who = running
            self.blame(key, who, "the process ended while it ran, twice")
        else:
            self._state["interrupted"].append(running)

    def _save(self) -> None:
        self._state["spent_s"] = self.spent
        write_atomically(self._state_path, json.dumps(self._state, indent=1) + "\n")
