"""The roofline: the least bytes and arithmetic that a call needs, and the rates that a device reaches."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from fastprefix.measure.operator.problem import Mode, Problem


@dataclass(frozen=True)
class Cost:
    """Bytes moved once to or from memory, and floating-point operations (a multiply-add is two)."""

    bytes: int
    flops: int

    def bandwidth(self, seconds: float) -> float:
        """GB/s (1e9 bytes) reached in that time."""
        return self.bytes / seconds / 1e9

    def rate(self, seconds: float) -> float:
        """TFLOP/s reached in that time."""
        return self.flops / seconds / 1e12


@dataclass(frozen=True)
class Peaks:
    """The rates that a device reaches in a copy and in a square matrix product, as measured, not from a data sheet."""

    gb_s: float
    tflop_s: float

    def seconds(self, cost: Cost) -> float:
        """The shortest time in which this device can do work of that cost."""
        return max(cost.bytes / (self.gb_s * 1e9), cost.flops / (self.tflop_s * 1e12))

    def bound(self, cost: Cost) -> str:
        """``memory`` or ``compute``, whichever limits :meth:`seconds`."""
        return "memory" if cost.bytes / self.gb_s >= cost.flops / self.tflop_s / 1e3 else "compute"


def visible_pairs(problem: Problem) -> int:
    """The number of (query, key) pairs that attend in one head and sample: all of the prefix, the causal content."""
    content = problem.S * problem.T
    if problem.causal:
        content -= problem.S * (problem.S - 1) // 2
    return problem.S * problem.P + content


def cost(problem: Problem, mode: Mode) -> Cost:
    """The least cost of one call: every tensor is read or written once, the prefix once for the whole batch.

    ``forward`` and ``decode`` read q, k, v and the prefix and write o and lse. ``backward`` adds the backward pass,
    which reads them again with o, lse and do, and writes dq, dk, dv and the gradients of the prefix. ``lowest`` adds
    only the part of it that the gradients of the prefix need: q, o, do, lse and the prefix. Arithmetic: for each
    pair, two matrix products in the forward pass and five in the backward pass; the gradients of the prefix need four
    of these, for the pairs with a prefix token.
    """
    x = problem
    queries = x.B * x.H * x.S * x.D  # q, o, do and dq, each
    content = 2 * x.B * x.H_kv * x.T * x.D
    prefix = 2 * x.H_kv * x.P * x.D
    lse_bytes = x.B * x.H * x.S * (8 if x.dtype == torch.float64 else 4)
    pairs = visible_pairs(x)
    elements, products, lses = 2 * queries + content + prefix, 2 * pairs, 1
    if mode == "backward":
        elements, products, lses = elements + 4 * queries + 2 * content + 2 * prefix, 7 * pairs, 2
    elif mode == "lowest" and x.P:
        elements, products, lses = elements + 3 * queries + 2 * prefix, products + 4 * x.S * x.P, 2
    return Cost(elements * x.dtype.itemsize + lses * lse_bytes, products * 2 * x.D * x.B * x.H)


def measure_peaks(device: torch.device | str, dtype: torch.dtype) -> Peaks:
    """Measure :class:`Peaks` in about a second, each as the best of a few runs."""
    kind = torch.device(device).type
    count, side = (2**28, 8192) if kind == "cuda" else (2**27, 1024)
    # Ones, not zeros: pages of zeros that nobody has written share one physical page, which stays in the cache.
    source = torch.ones(count // dtype.itemsize, dtype=dtype, device=device)
    target = torch.empty_like(source)
    copy = _best(lambda: target.copy_(source), kind)
    a = torch.randn(side, side, device=device).to(dtype)
    product = _best(lambda: a @ a, kind)
    return Peaks(2 * source.nbytes / copy / 1e9, 2 * side**3 / product / 1e12)


def _best(fn: Callable[[], Any], kind: str, runs: int = 5) -> float:
    times = []
    for _ in range(runs + 1):
        if kind == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        fn()
        if kind == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:])
