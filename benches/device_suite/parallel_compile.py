"""Compile the plan's Triton kernels in parallel, in other processes.

The rows find them in Triton's cache on disk. A kernel that fails to compile here is compiled again when a row needs it.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait

import torch

from benches.device_suite.compiled_kernels import Device, MetaCall, distinct_kernels, launches, meta_calls
from benches.device_suite.plan import Job
from fastprefix.machine.device_errors import describe_error

PATIENCE = 150.0  # seconds to wait; after that, rows compile the missing kernels themselves
MOST_PROCESSES = 14


class CompilePool:
    """Processes that compile the plan's kernels in the background; leaving the ``with`` block ends them."""

    def __init__(self, plan: Sequence[Job], device: Device) -> None:
        self._tasks, self._failed = distinct_kernels(meta_calls(plan), device)
        self._pool = ProcessPoolExecutor(processes(), mp_context=multiprocessing.get_context("spawn"))
        self._start = time.monotonic()
        self._futures = [self._pool.submit(_compile, task, device) for task in self._tasks]

    def wait(self) -> str | None:
        """Wait until all kernels are compiled; the first call returns a sentence about it, later ones None."""
        if not self._futures:
            return None
        done, left = wait(self._futures, PATIENCE)
        failed = [*self._failed, *(reason for x in done if (reason := _reason(x)))]
        self._futures = []
        # The processes release the device before anything is timed, unless one of them hangs.
        self._pool.shutdown(wait=not left, cancel_futures=True)
        told = (
            f"{len(self._tasks)} kernels compiled by {processes()} processes in {time.monotonic() - self._start:.0f} s"
        )
        told += f"; {len(left)} not in time" if left else ""
        return told + (f"; {len(failed)} failed, the first: {failed[0]}" if failed else "")

    def __enter__(self) -> CompilePool:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


def processes() -> int:
    """The number of processes: all cores but two, which are left to this process and its threads."""
    return max(1, min(MOST_PROCESSES, (os.cpu_count() or 1) - 2))


def this_device() -> Device:
    """Compute capability and name of the current CUDA device."""
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor, torch.cuda.get_device_name()


def _reason(future: Future[str | None]) -> str | None:
    error = future.exception()
    return future.result() if error is None else f"{type(error).__name__}: {error}"


def _compile(task: tuple[MetaCall, int], device: Device) -> str | None:
    """Compile one kernel in another process; an error in words, or None."""
    source, index = task
    try:
        launch = launches(source, device)[index]
        launch.kernel.warmup(*launch.args, grid=(1,), **launch.options)
    except Exception as error:
        return f"{source.problem.label}: {describe_error(error)}"
    return None
