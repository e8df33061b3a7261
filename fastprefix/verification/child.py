"""A process that does one task after another and may end at any of them."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import tempfile
import threading
from contextlib import suppress
from typing import Any

# How a process ends that the system, a scheduler or a user ends: that says nothing of what it ran.
KILLED = tuple(-getattr(signal, name) for name in ("SIGKILL", "SIGTERM", "SIGINT") if hasattr(signal, name))
START_PATIENCE = 120.0  # seconds until a child has imported torch and found its device


class ChildError(OSError):
    """No child process can be started."""


class Child:
    """One child process.

    Args:
        command: its command line.
        environment: all of its variables.
        patience: seconds of silence after which it hangs.

    Raises:
        ChildError: it cannot be started, or ends before it is ready.
    """

    def __init__(self, command: list[str], environment: dict[str, str], patience: float) -> None:
        self._patience = patience
        self._words = tempfile.TemporaryFile()  # noqa: SIM115  # lives as long as the process
        # Another group of processes, so that what the child has started ends with it.
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._words,
                start_new_session=True,
                env=environment,
            )
        except OSError as error:
            raise ChildError(f"no child process could start: {error}") from error
        self._lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        threading.Thread(target=self._listen, daemon=True).start()
        self.alive = True
        try:
            answer, _, detail, _ = self._answer(START_PATIENCE)
        except BaseException:  # Ctrl-C
            self.end()
            raise
        if answer is None:
            raise ChildError(f"no child process could start: {detail}")

    def _listen(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:  # closed here alone: to close it elsewhere would wait for this read
            for line in lines:
                self._lines.put(line)
        self._lines.put(b"")

    def ask(self, message: dict[str, Any]) -> tuple[dict[str, Any] | None, str, str, str]:
        """The child's answer; without one, how it ended, in words, and what it last said that it ran."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()
        return self._answer(self._patience)

    def _answer(self, patience: float) -> tuple[dict[str, Any] | None, str, str, str]:
        at = ""
        while True:
            try:
                line = self._lines.get(timeout=patience)
            except queue.Empty:
                self.end()
                return None, "hung", f"silent for {patience:.0f} s at {at}", at
            message = _message(line)
            if "at" in message:
                at = message["at"]
            if "at" in message or (
                line and not message
            ):  # the latter is what something printed before it was redirected
                continue
            if message and "lost" not in message:
                return message, "", "", at
            self.end(kill=False)
            end = "killed" if self._process.returncode in KILLED else "crashed"
            return None, end, f"{message.get('lost') or self._how_it_ended()}{at and f', at {at}'}", at

    def _how_it_ended(self) -> str:
        code = self._process.returncode
        self._words.seek(0)
        words = self._words.read().decode(errors="replace").strip().splitlines()
        told = f"exit status {code}"
        if code is not None and code < 0:
            with suppress(ValueError):
                told = signal.Signals(-code).name
        return told + (f": {words[-1][:200]}" if words else "")

    def end(self, kill: bool = True) -> None:
        """End the process and all that it started."""
        if not self.alive:
            return
        self.alive = False
        if not kill:  # it is ending by itself, and its exit status is wanted
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(5)
        with suppress(OSError, AttributeError):  # where there are groups of processes
            os.killpg(self._process.pid, signal.SIGKILL)
        with suppress(OSError):
            self._process.kill()
        with suppress(subprocess.TimeoutExpired):  # a driver may hold a process for good
            self._process.wait(5)
        if self._process.stdin is not None:
            with suppress(OSError):
                self._process.stdin.close()


def _message(line: bytes) -> dict[str, Any]:
    """A line of the child's; empty for any other text, and where it has ended in the middle of one."""
    try:
        found = json.loads(line)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
