"""The state of a run on one device: its rows on disk, what is running, and how much of the budget is left."""

from __future__ import annotations

import json
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

from benches.device_suite.plan import PARTS, Part
from fastprefix.machine.files import slug, write_atomically
from fastprefix.measure.report_tables import ResultFile, environment


class SuiteState:
    """Rows by part in ``<out>/<device>/<part>.json``, and next to them the state that a later process resumes from.

    Args:
        out: the folder that holds a folder for each device.
        device: the device's name in torch.
        budget: seconds for the whole suite, including earlier runs that are resumed.
        resume: keep existing rows. A candidate that was running when two earlier processes ended is skipped.
        only: the parts that run; rows of the other parts are kept.
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
        """Seconds since the suite began, in earlier processes too."""
        return time.monotonic() - self._start

    @property
    def out_of_budget(self) -> bool:
        """Whether the budget is spent, so that no further row may begin."""
        return self.spent > self.budget

    def done(self, part: Part, key: str) -> bool:
        """Whether there is a result for the row."""
        return key in self.files[part]

    def blamed(self, key: str) -> dict[str, str]:
        """The candidates that must not run in this row again, and why."""
        return dict(self._state["blamed"].get(key, {}))

    def begin(self, key: str, who: str) -> None:
        """Note on disk what runs: if this process dies, the next one knows what was running."""
        self._state["running"] = [key, who]
        self._save()

    def end(self) -> None:
        """Note that nothing is running."""
        self._state["running"] = None
        self._save()

    def blame(self, key: str, who: str, reason: str) -> None:
        """Note that ``who`` must not run in this row again, and why."""
        self._state["blamed"].setdefault(key, {})[who] = reason
        self.end()

    def add(self, part: Part, row: dict[str, Any]) -> None:
        """Add a finished row."""
        self.files[part].add(row)
        self.end()

    def rows(self, part: Part) -> list[dict[str, Any]]:
        """The rows of a part so far."""
        return self.files[part].rows

    def finish(self) -> None:
        """Remove the state file: the suite is finished and there is nothing to resume."""
        self._state_path.unlink(missing_ok=True)

    def _look_back(self) -> None:
        """Skip a candidate that was running when two processes ended; a single end may have had another cause."""
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
