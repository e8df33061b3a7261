"""The rows of the device suite, the most important first: rows that do not fit the budget are dropped from the end."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from benches.device_suite.model_correctness import MODELS
from fastprefix.dispatch import has_every_gradient
from fastprefix.measure import Mode, Problem
from fastprefix.types import BACKENDS, BackendName

Part = Literal["correctness", "operator", "step"]
PARTS: tuple[Part, ...] = get_args(Part)

# Checks compare gradients. A backend without any is checked by `fastprefix verify`, and timed with the others.
DIFFERENTIABLE: tuple[BackendName, ...] = tuple(name for name in BACKENDS if has_every_gradient(name))
BF16 = torch.bfloat16
HEADS = ((32, 8, 128), (12, 12, 64))  # H, H_kv, D
LENGTHS = ((32, 512), (8, 2048), (2, 8192))  # B, S
PREFIXES = (128, 2048, 16, 0)
LOWEST_LENGTHS, LOWEST_PREFIXES = ((8, 2048), (32, 512)), (16, 128)
DECODE_BATCHES, DECODE_PREFIXES, DECODE_KEYS = (32, 256, 1), (8192, 512), 512
COMPILED_PREFIX = 128  # FlexAttention is compiled for this length only, since every shape costs a compilation
COMPILED_DECODE = (32, 8192)  # B, P
# Table 1 of DualKV: so many responses of 2048 tokens each read one prompt.
SHARED_PROMPTS = ((28, 4096), (28, 16384), (16, 32768), (28, 32768), (16, 65536))  # B, P
RESPONSE = 2048


@dataclass(frozen=True)
class OperatorCheck:
    """A row that checks the operator: plain calls of many shapes, or calls that use every argument."""

    what: Literal["shapes", "arguments"]
    backend: BackendName
    dtype: str
    compiled: bool = False

    @property
    def key(self) -> str:
        return f"{self.what} {self.backend} {self.dtype} {'compiled' if self.compiled else 'eager'}"


@dataclass(frozen=True)
class ModelCheck:
    """A row that checks a whole model against explicit concatenation."""

    model: str
    backend: BackendName
    dtype: str

    @property
    def key(self) -> str:
        return f"{self.model} {self.backend} {self.dtype}"


@dataclass(frozen=True)
class OperatorTiming:
    """A row that times the operator.

    Attributes:
        flex: whether FlexAttention is compiled for it.
        graphs: whether calls are timed as CUDA graphs, whose times exclude launches from Python.
        long: whether a call takes so long that it is repeated less often, and never with a dense mask.
    """

    problem: Problem
    mode: Mode
    flex: bool = False
    graphs: bool = False
    long: bool = False

    @property
    def key(self) -> str:
        return f"{self.mode} {self.problem.label}" + (" graph" if self.graphs else "")


@dataclass(frozen=True)
class TrainingTiming:
    """A row that times whole training steps."""

    num_virtual_tokens: int
    batch: int
    tokens: int
    tiny: bool = False

    @property
    def key(self) -> str:
        return f"step B{self.batch} S{self.tokens} P{self.num_virtual_tokens}"


Job = OperatorCheck | ModelCheck | OperatorTiming | TrainingTiming


def part(job: Job) -> Part:
    """The part that a row belongs to, which also names its file."""
    match job:
        case OperatorTiming():
            return "operator"
        case TrainingTiming():
            return "step"
    return "correctness"


def jobs(device: str, smoke: bool, only: Collection[Part] = PARTS) -> list[Job]:
    """All rows of these parts, in order."""
    found = [*_smoke_checks(), *_smoke(device)] if smoke else [*_checks(), *_full(device), *_more_checks()]
    return [job for job in found if part(job) in only]


def _checks() -> Iterator[Job]:
    """Checks by backend: while those of the first backends run, the kernels of the last are compiled in parallel."""
    for backend in DIFFERENTIABLE:
        for dtype in ("bf16", "fp16", "fp32"):
            yield OperatorCheck("shapes", backend, dtype)
        yield OperatorCheck("arguments", backend, "bf16")
        for dtype in ("bf16", "fp16"):
            yield OperatorCheck("shapes", backend, dtype, compiled=True)
    for model in MODELS:
        for dtype in ("fp32", "bf16"):
            for backend in DIFFERENTIABLE:
                yield ModelCheck(model, backend, dtype)


def _more_checks() -> Iterator[Job]:
    """Every argument in a second dtype, which doubles its kernels: last, as plain shapes were checked in that dtype."""
    for backend in DIFFERENTIABLE:
        yield OperatorCheck("arguments", backend, "fp16")


def _smoke_checks() -> Iterator[Job]:
    for backend in DIFFERENTIABLE:
        for dtype in ("bf16", "fp16", "fp32"):
            yield OperatorCheck("shapes", backend, dtype)
        yield OperatorCheck("arguments", backend, "fp32")
        yield OperatorCheck("shapes", backend, "fp32", compiled=True)
    for model in MODELS:
        for backend in DIFFERENTIABLE:
            yield ModelCheck(model, backend, "fp32")


def _smoke(device: str) -> Iterator[Job]:
    tiny = Problem.train(2, 4, 2, 64, 16, 32, device=device)
    yield OperatorTiming(tiny, "backward")
    yield OperatorTiming(tiny, "lowest")
    yield OperatorTiming(tiny, "forward")
    yield OperatorTiming(tiny.without_prefix(), "backward")
    yield OperatorTiming(Problem.decode(4, 4, 2, 16, 64, 32, device=device), "decode", graphs=device == "cuda")
    yield TrainingTiming(16, 2, 32, tiny=True)


def _full(device: str) -> Iterator[Job]:
    def train(P: int, mode: Mode, heads: tuple[int, int, int]) -> Iterator[OperatorTiming]:
        H, H_kv, D = heads
        for B, S in LOWEST_LENGTHS if mode == "lowest" else LENGTHS:
            problem = Problem.train(B, H, H_kv, S, P, D, dtype=BF16, device=device)
            yield OperatorTiming(problem, mode, flex=P == COMPILED_PREFIX and heads == HEADS[0] and mode != "lowest")

    def decode(heads: tuple[int, int, int]) -> Iterator[OperatorTiming]:
        H, H_kv, D = heads
        for P in DECODE_PREFIXES:
            for B in DECODE_BATCHES:
                problem = Problem.decode(B, H, H_kv, DECODE_KEYS, P, D, dtype=BF16, device=device)
                yield OperatorTiming(problem, "decode", graphs=True)
                yield OperatorTiming(problem, "decode", flex=(B, P) == COMPILED_DECODE and heads == HEADS[0])

    large, small = HEADS
    yield from train(128, "backward", large)
    yield TrainingTiming(128, 8, 512)
    yield from train(16, "backward", large)
    yield from decode(large)
    for P in LOWEST_PREFIXES:
        yield from train(P, "lowest", large)
    yield from train(2048, "backward", large)
    yield TrainingTiming(16, 8, 512)
    yield TrainingTiming(2048, 8, 512)
    for P in PREFIXES:
        yield from train(P, "forward", large)
    for B, P in SHARED_PROMPTS:
        problem = Problem.train(B, *large[:2], RESPONSE, P, large[2], dtype=torch.float16, device=device)
        yield OperatorTiming(problem, "forward", long=True)
    yield from train(0, "backward", large)
    for P in PREFIXES:
        yield from train(P, "backward", small)
    yield from decode(small)
    for P in PREFIXES:
        yield from train(P, "forward", small)
