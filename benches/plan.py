"""What the device suite measures, the most important first: what the budget does not reach is dropped from the end."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from fastprefix.measure import Mode, Problem
from fastprefix.types import BACKENDS, BackendName

BF16 = torch.bfloat16
HEADS = ((32, 8, 128), (12, 12, 64))  # H, H_kv, D
LENGTHS = ((32, 512), (8, 2048), (2, 8192))  # B, S
PREFIXES = (128, 2048, 16, 0)
DECODE_BATCHES, DECODE_PREFIXES, DECODE_KEYS = (32, 256, 1), (8192, 512), 512
COMPILED_PREFIX = 128  # FlexAttention is compiled for this one only: every shape is a compilation


@dataclass(frozen=True)
class Check:
    """A row of correctness."""

    backend: BackendName
    dtype: str
    compiled: bool

    @property
    def key(self) -> str:
        return f"{self.backend} {self.dtype} {'compiled' if self.compiled else 'eager'}"


@dataclass(frozen=True)
class Time:
    """A row of the operator's times; ``graphs``: of CUDA graphs, without the launches."""

    problem: Problem
    mode: Mode
    flex: bool = False
    graphs: bool = False

    @property
    def key(self) -> str:
        return f"{self.mode} {self.problem.label}" + (" graph" if self.graphs else "")


@dataclass(frozen=True)
class Train:
    """A row of whole training steps."""

    num_virtual_tokens: int
    batch: int
    tokens: int
    tiny: bool = False

    @property
    def key(self) -> str:
        return f"step B{self.batch} S{self.tokens} P{self.num_virtual_tokens}"


Job = Check | Time | Train


def checks(smoke: bool) -> Iterator[Check]:
    """Every backend and dtype, eager first; a smoke test compiles in one dtype."""
    for compiled in (False, True):
        for backend in BACKENDS:
            for dtype in ("fp32",) if compiled and smoke else ("bf16", "fp16", "fp32"):
                yield Check(backend, dtype, compiled)


def jobs(device: str, smoke: bool) -> list[Job]:
    """All rows, in order."""
    return [*checks(smoke), *(_smoke(device) if smoke else _full(device))]


def _smoke(device: str) -> Iterator[Job]:
    tiny = Problem.train(2, 4, 2, 64, 16, 32, device=device)
    yield Time(tiny, "backward")
    yield Time(tiny, "forward")
    yield Time(tiny.without_prefix(), "backward")
    yield Time(Problem.decode(4, 4, 2, 16, 64, 32, device=device), "decode", graphs=device == "cuda")
    yield Train(16, 2, 32, tiny=True)


def _full(device: str) -> Iterator[Job]:
    def train(P: int, mode: Mode, heads: tuple[int, int, int]) -> Iterator[Time]:
        H, H_kv, D = heads
        for B, S in LENGTHS:
            problem = Problem.train(B, H, H_kv, S, P, D, dtype=BF16, device=device)
            yield Time(problem, mode, flex=P == COMPILED_PREFIX and heads == HEADS[0])

    def decode(heads: tuple[int, int, int]) -> Iterator[Time]:
        H, H_kv, D = heads
        for P in DECODE_PREFIXES:
            for B in DECODE_BATCHES:
                problem = Problem.decode(B, H, H_kv, DECODE_KEYS, P, D, dtype=BF16, device=device)
                yield Time(problem, "decode", graphs=True)
                yield Time(problem, "decode")

    large, small = HEADS
    yield from train(128, "backward", large)
    yield Train(128, 8, 512)
    yield from train(2048, "backward", large)
    yield from decode(large)
    yield Train(2048, 8, 512)
    for P in PREFIXES:
        yield from train(P, "forward", large)
    for P in PREFIXES[2:]:
        yield from train(P, "backward", large)
    for P in PREFIXES:
        yield from train(P, "backward", small)
    yield from decode(small)
    for P in PREFIXES:
        yield from train(P, "forward", small)
