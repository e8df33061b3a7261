"""The plan's Triton kernels, compiled by other processes all at once.

They reach the rows through Triton's cache on disk; what fails here, for whatever reason, is compiled where it is first
needed.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait

import torch

from benches.kernels import Device, Source, distinct, launches, sources
from benches.plan import Job
from fastprefix.measure.device_errors import describe_error

PATIENCE = 150.0  # seconds; then rows compile what is still missing themselves
MOST_PROCESSES = 14


class Compilers:
    """Processes that compile the plan's kernels while this one goes on; ``with`` ends them."""

    def __init__(self, plan: Sequence[Job], device: Device) -> None:
        self._tasks, self._failed = distinct(sources(plan), device)
        self._pool = ProcessPoolExecutor(processes(), mp_context=multiprocessing.get_context("spawn"))
        self._start = time.monotonic()
        self._futures = [self._pool.submit(_compile, task, device) for task in self._tasks]

    def wait(self) -> str | None:
        """Until all is compiled; once a sentence about it, then None."""
        if not self._futures:
            return None
        done, left = wait(self._futures, PATIENCE)
        failed = [*self._failed, *(reason for x in done if (reason := _reason(x)))]
        self._futures = []
        # Their hold on the device is gone before anything is timed, unless one of them hangs.
        self._pool.shutdown(wait=not left, cancel_futures=True)
        told = (
            f"{len(self._tasks)} kernels compiled by {processes()} processes in {time.monotonic() - self._start:.0f} s"
        )
        told += f"; {len(left)} not in time" if left else ""
        return told + (f"; {len(failed)} failed, the first: {failed[0]}" if failed else "")

    def __enter__(self) -> Compilers:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


def processes() -> int:
    """All cores but two, for this process and whatever it starts."""
    return max(1, min(MOST_PROCESSES, (os.cpu_count() or 1) - 2))


def this_device() -> Device:
    """The current CUDA device's."""
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor, torch.cuda.get_device_name()


def _reason(future: Future[str | None]) -> str | None:
    error = future.exception()
    return future.result() if error is None else f"{type(error).__name__}: {error}"


def _compile(task: tuple[Source, int], device: Device) -> str | None:
    """In another process; what is wrong, in words."""
    source, index = task
    try:
        launch = launches(source, device)[index]
        launch.kernel.warmup(*launch.args, grid=(1,), **launch.options)
    except Exception as error:
        return f"{source.problem.label}: {describe_error(error)}"
    return None
