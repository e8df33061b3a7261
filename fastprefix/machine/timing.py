"""Interleaved timing: candidates take turns, so that a disturbance of the machine disturbs all of them alike."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

# More than the L2 cache of any current GPU: a repeat must not find the operands of the one before in it.
FLUSH_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Timing:
    """Seconds of each repeat, in the order of the rounds."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def best(self) -> float:
        """The shortest time: the least disturbed by other processes on the machine."""
        return min(self.samples)

    @property
    def quartiles(self) -> tuple[float, float]:
        """First and third quartile, in seconds; with a single sample, both are that sample."""
        return _quartiles(self.samples)


class Ratio(NamedTuple):
    """How many times slower one candidate is than another: median and quartiles over rounds."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f}x ({self.low:.2f} to {self.high:.2f})"


def interleaved(
    fns: Mapping[str, Callable[[], Any]],
    repeats: int = 10,
    warmup: int = 2,
    device: torch.device | str = "cpu",
) -> dict[str, Timing]:
    """Time the candidates round-robin in this process; each round starts with the next candidate.

    Args:
        fns: candidates by name.
        repeats: timed rounds, at least 1.
        warmup: rounds before them that are not timed.
        device: on ``cuda`` each call is timed by two events, after a write that evicts the caches; elsewhere the
            wall clock is read before and after it.

    Returns:
        a :class:`Timing` for each name, with ``repeats`` samples in seconds.

    Raises:
        ValueError: no candidate, or ``repeats`` below 1.
    """
    if not fns or repeats < 1:
        raise ValueError(f"interleaved: got {len(fns)} candidates and {repeats} repeats, expected 1 or more")
    for _ in range(warmup):
        for fn in fns.values():
            fn()
    names = list(fns)
    take = _cuda_clock(torch.device(device)) if torch.device(device).type == "cuda" else _wall_clock
    samples: dict[str, list[Callable[[], float]]] = {name: [] for name in names}
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for turn in range(repeats):
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                samples[name].append(take(fns[name]))
    finally:
        if collecting:
            gc.enable()
    return {name: Timing(tuple(read() for read in reads)) for name, reads in samples.items()}


def ratio(timings: Mapping[str, Timing], slow: str, fast: str) -> Ratio:
    """``slow / fast`` within each round, so that only calls that ran close in time are compared.

    Raises:
        KeyError: a name that was not timed.
        ValueError: the two were not timed in the same rounds.
    """
    pairs = zip(timings[slow].samples, timings[fast].samples, strict=True)
    values = tuple(a / b for a, b in pairs)
    return Ratio(statistics.median(values), *_quartiles(values))


def captured(fn: Callable[[], Any]) -> Callable[[], None]:
    """``fn`` as a CUDA graph, whose replay costs the device's own time without the launches from Python.

    Raises:
        RuntimeError: no CUDA device, or ``fn`` does something that a graph cannot capture.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            fn()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fn()
    return graph.replay


def _quartiles(values: tuple[float, ...]) -> tuple[float, float]:
    if len(values) == 1:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def _wall_clock(fn: Callable[[], Any]) -> Callable[[], float]:
    start = time.perf_counter()
    fn()
    seconds = time.perf_counter() - start
    return lambda: seconds


def _cuda_clock(device: torch.device) -> Callable[[Callable[[], Any]], Callable[[], float]]:
    scratch = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)

    def take(fn: Callable[[], Any]) -> Callable[[], float]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        scratch.zero_()
        start.record()
        fn()
        end.record()

        def read() -> float:
            end.synchronize()
            return start.elapsed_time(end) / 1e3

        return read

    return take
