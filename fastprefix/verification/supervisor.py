"""Runs tasks in child processes. The end of one, or its silence, is a verdict, and another goes on behind it."""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from .child import Child, ChildError
from .identity import PACKAGE

# Two ends of a child over one route are no accident; its other tasks are not tried.
MOST_ENDS = 2
JUDGE = "reference"


class Task(NamedTuple):
    """What a child is asked: a message (see ``checks.worker``), and the routes that it runs."""

    message: dict[str, Any]
    routes: tuple[str, ...]


Groups = queue.SimpleQueue  # of groups of tasks


class Outcome(NamedTuple):
    """What became of a task: the child's answer, or why there is none."""

    task: Task
    answer: dict[str, Any] | None
    end: str  # "crashed", "hung" or "killed" (by the system or a user); empty with an answer
    blamed: str  # the route that ran; empty where several did in turns
    detail: str
    tried: bool = True


@dataclass
class Supervisor:
    """Runs groups of tasks by a number of children.

    Attributes:
        place: the device, as the children name it.
        few: whether backends are interpreted, so that only the smallest calls are made.
        patience: seconds of silence after which a child hangs.
        deadline: ``time.monotonic()`` after which no task is begun.
        threads: of each child.
        environment: variables of the children's own.
    """

    place: torch.device
    few: bool
    patience: float
    deadline: float
    threads: int
    environment: dict[str, str] = field(default_factory=dict)
    ends: dict[str, list[str]] = field(default_factory=dict)  # by route
    _kept: Child | None = None

    def run(
        self, groups: Sequence[Sequence[Task]], workers: int, done: Callable[[Outcome], None] = lambda outcome: None
    ) -> list[Outcome]:
        """Run all tasks; those of a group in order, in one child unless it ends.

        Tasks that are not begun by the deadline have no outcome.

        Raises:
            ChildError: a child cannot be started; its last words are in the message.
        """
        self.environment["FASTPREFIX_VERIFY"] = "off"
        self.environment.pop("OMP_WAIT_POLICY", None)
        if workers > 1:  # threads that wait by spinning would take the cores from those of the other children
            self.environment["OMP_WAIT_POLICY"] = "PASSIVE"
        waiting: queue.SimpleQueue[Sequence[Task]] = queue.SimpleQueue()
        for group in groups:
            waiting.put(group)
        found: list[Outcome] = []
        lock = threading.Lock()

        def note(outcome: Outcome) -> None:
            with lock:
                if outcome.end and outcome.blamed and outcome.tried:
                    self.ends.setdefault(outcome.blamed, []).append(outcome.end)
                found.append(outcome)
                done(outcome)

        workers = min(workers, len(groups))
        try:
            if workers == 1:  # in this thread, which outlives the child, so that the next run goes on with it
                kept, self._kept = self._kept, None
                self._kept = self._work(waiting, note, kept)
            elif workers:
                self._work_side_by_side(waiting, note, workers)
        except ChildError:
            if not found:  # what was found before counts: a route may have left the device so that no other can start
                raise
        return found

    def command(self) -> list[str]:
        """The command line of a child: this package by its place, other modules where the parent finds them."""
        code = (
            "import sys; sys.path[:1] = [] if sys.path[:1] == [''] else sys.path[:1]\n"
            "import importlib.util, json\n"
            "folder, name, paths, *rest = sys.argv[1:]\n"
            "sys.path[:] = json.loads(paths)\n"
            "spec = importlib.util.spec_from_file_location(name, folder + '/__init__.py', "
            "submodule_search_locations=[folder])\n"
            "sys.modules[name] = package = importlib.util.module_from_spec(spec)\n"
            "spec.loader.exec_module(package)\n"
            "importlib.import_module(name + '.verification.checks.worker').main(*rest)\n"
        )
        own = [str(PACKAGE), PACKAGE.name, json.dumps(sys.path), str(self.place), str(self.threads)]
        return [sys.executable, "-c", code, *own, "few" if self.few else "all"]

    def close(self) -> None:
        """End the child that the last run has left."""
        if self._kept is not None:
            self._kept.end()

    def _work_side_by_side(self, waiting: Groups, note: Callable[[Outcome], None], workers: int) -> None:
        errors: list[BaseException] = []

        def work() -> None:
            try:
                child = self._work(waiting, note, None)
                if child is not None:
                    child.end()
            except BaseException as error:  # told by the thread that waits
                errors.append(error)

        threads = [threading.Thread(target=work, daemon=True) for _ in range(workers)]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                while thread.is_alive():
                    thread.join(0.1)  # so that Ctrl-C is heard
        except BaseException:
            self.deadline = 0.0
            raise
        for error in errors:
            if not isinstance(error, ChildError):
                raise error
        if errors and len(errors) == workers:
            raise errors[0]
        # One that could not start has left its group, perhaps after the others had gone.
        child = self._work(waiting, note, None)
        if child is not None:
            child.end()

    def _work(self, waiting: Groups, note: Callable[[Outcome], None], child: Child | None) -> Child | None:
        """Run groups until there are none, or the deadline; the child is returned, or ended after an error."""
        try:
            while time.monotonic() < self.deadline:
                try:
                    group = list(waiting.get_nowait())
                except queue.Empty:
                    break
                while group and time.monotonic() < self.deadline:
                    if child is None or not child.alive:
                        try:
                            child = Child(self.command(), {**os.environ, **self.environment}, self.patience)
                        except ChildError:
                            waiting.put(group)
                            raise
                    note(self._do(child, group.pop(0)))
        except BaseException:
            if child is not None:
                child.end()
            raise
        return child

    def _do(self, child: Child, task: Task) -> Outcome:
        routes = [route for route in task.routes if route == JUDGE or len(self.ends.get(route, ())) < MOST_ENDS]
        if not set(routes) - {JUDGE}:
            own = self.ends[task.routes[0]]
            end = "killed" if "killed" in own else own[-1]  # then it says nothing of the route
            told = f"not tried: its process had {end} {MOST_ENDS} times"
            return Outcome(task, None, end, task.routes[0], told, tried=False)
        message = {**task.message, **({"routes": routes} if "routes" in task.message else {})}
        answer, end, detail, at = child.ask(message)
        # A task of one route says where in it the child was; one of several says which route ran, if one by itself.
        blamed = task.routes[0] if len(task.routes) == 1 else at if at in task.routes else ""
        return Outcome(task, answer, end, blamed, detail)
