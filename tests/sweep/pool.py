"""A worker process kept over many classes, and started again where one of them crashes or hangs it."""

from __future__ import annotations

import contextlib
import json
import select
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
IMPORTS = 60.0  # what the first class of a process waits for besides
COMMAND = (sys.executable, "-m", "tests.sweep.worker")


class Worker:
    """One process; ``check`` never raises for what happens in it."""

    def __init__(self, timeout: float = 60.0, command: Sequence[str] = COMMAND) -> None:
        self.timeout, self.command = timeout, command
        self.process: subprocess.Popen[str] | None = None

    def check(self, name: str) -> dict[str, Any]:
        """What a class's checks end in."""
        fresh = self.process is None
        if self.process is None:
            self.process = subprocess.Popen(
                self.command, cwd=ROOT, text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            )  # fmt: skip
        assert self.process.stdin is not None and self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended already, which shows below
            self.process.stdin.write(name + "\n")
            self.process.stdin.flush()
        ready, _, _ = select.select([self.process.stdout], [], [], self.timeout + (IMPORTS if fresh else 0.0))
        answer = self.process.stdout.readline() if ready else ""
        if answer:
            found: dict[str, Any] = json.loads(answer)
            return found
        reason = f"the process ended with {self.process.wait()}" if ready else f"no answer in {self.timeout:.0f} s"
        self.close()
        return {"class": name, "checks": {}, "not run": reason}

    def close(self) -> None:
        """End the process."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None
