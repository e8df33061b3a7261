"""What the device suite does, the most important first: what the budget does not reach is dropped from the end."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from benches.equality import MODELS
from fastprefix.measure import Mode, Problem
from fastprefix.types import BACKENDS, BackendName

Part = Literal["correctness", "operator", "step"]
PARTS: tuple[Part, ...] = get_args(Part)

BF16 = torch.bfloat16
HEADS = ((32, 8, 128), (12, 12, 64))  # H, H_kv, D
LENGTHS = ((32, 512), (8, 2048), (2, 8192))  # B, S
PREFIXES = (128, 2048, 16, 0)
LOWEST_LENGTHS, LOWEST_PREFIXES = ((8, 2048), (32, 512)), (16, 128)
DECODE_BATCHES, DECODE_PREFIXES, DECODE_KEYS = (32, 256, 1), (8192, 512), 512
COMPILED_PREFIX = 128  # FlexAttention is compiled for this one only: every shape is a compilation
COMPILED_DECODE = (32, 8192)  # B, P


@dataclass(frozen=True)
class Check:
    """A row of correctness of the operator: plain calls of many shapes, or calls that use every argument."""

    what: Literal["shapes", "arguments"]
    backend: BackendName
    dtype: str
    compiled: bool = False

    @property
    def key(self) -> str:
        return f"{self.what} {self.backend} {self.dtype} {'compiled' if self.compiled else 'eager'}"


@dataclass(frozen=True)
class Equal:
    """A row of correctness of a whole model beside explicit concatenation."""

    model: str
    backend: BackendName
    dtype: str

    @property
    def key(self) -> str:
        return f"{self.model} {self.backend} {self.dtype}"


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


Job = Check | Equal | Time | Train


def part(job: Job) -> Part:
    """What a row belongs to; the name of its file, too."""
    match job:
        case Time():
            return "operator"
        case Train():
            return "step"
    return "correctness"


def jobs(device: str, smoke: bool, only: Collection[Part] = PARTS) -> list[Job]:
    """All rows of these parts, in order."""
    found = [*_smoke_checks(), *_smoke(device)] if smoke else [*_checks(), *_full(device), *_more_checks()]
    return [job for job in found if part(job) in only]


def _checks() -> Iterator[Job]:
    """The operator's by backend: while the first are judged, the kernels of the last are compiled (``kernels.py``)."""
    for backend in BACKENDS:
        for dtype in ("bf16", "fp16", "fp32"):
            yield Check("shapes", backend, dtype)
        yield Check("arguments", backend, "bf16")
        for dtype in ("bf16", "fp16"):
            yield Check("shapes", backend, dtype, compiled=True)
    for model in MODELS:
        for dtype in ("fp32", "bf16"):
            for backend in BACKENDS:
                yield Equal(model, backend, dtype)


def _more_checks() -> Iterator[Job]:
    """Twice the kernels of every argument, for a dtype that the shapes have been right in."""
    for backend in BACKENDS:
        yield Check("arguments", backend, "fp16")


def _smoke_checks() -> Iterator[Job]:
    for backend in BACKENDS:
        for dtype in ("bf16", "fp16", "fp32"):
            yield Check("shapes", backend, dtype)
        yield Check("arguments", backend, "fp32")
        yield Check("shapes", backend, "fp32", compiled=True)
    for model in MODELS:
        for backend in BACKENDS:
            yield Equal(model, backend, "fp32")


def _smoke(device: str) -> Iterator[Job]:
    tiny = Problem.train(2, 4, 2, 64, 16, 32, device=device)
    yield Time(tiny, "backward")
    yield Time(tiny, "lowest")
    yield Time(tiny, "forward")
    yield Time(tiny.without_prefix(), "backward")
    yield Time(Problem.decode(4, 4, 2, 16, 64, 32, device=device), "decode", graphs=device == "cuda")
    yield Train(16, 2, 32, tiny=True)


def _full(device: str) -> Iterator[Job]:
    def train(P: int, mode: Mode, heads: tuple[int, int, int]) -> Iterator[Time]:
        H, H_kv, D = heads
        for B, S in LOWEST_LENGTHS if mode == "lowest" else LENGTHS:
            problem = Problem.train(B, H, H_kv, S, P, D, dtype=BF16, device=device)
            yield Time(problem, mode, flex=P == COMPILED_PREFIX and heads == HEADS[0] and mode != "lowest")

    def decode(heads: tuple[int, int, int]) -> Iterator[Time]:
        H, H_kv, D = heads
        for P in DECODE_PREFIXES:
            for B in DECODE_BATCHES:
                problem = Problem.decode(B, H, H_kv, DECODE_KEYS, P, D, dtype=BF16, device=device)
                yield Time(problem, "decode", graphs=True)
                yield Time(problem, "decode", flex=(B, P) == COMPILED_DECODE and heads == HEADS[0])

    large, small = HEADS
    yield from train(128, "backward", large)
    yield Train(128, 8, 512)
    yield from train(16, "backward", large)
    yield from decode(large)
    for P in LOWEST_PREFIXES:
        yield from train(P, "lowest", large)
    yield from train(2048, "backward", large)
    yield Train(16, 8, 512)
    yield Train(2048, 8, 512)
    for P in PREFIXES:
        yield from train(P, "forward", large)
    yield from train(0, "backward", large)
    for P in PREFIXES:
        yield from train(P, "backward", small)
    yield from decode(small)
    for P in PREFIXES:
        yield from train(P, "forward", small)
