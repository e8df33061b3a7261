"""The candidates of a measurement: our operator, once for each backend, and the baselines."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch

from fastprefix import dispatch
from fastprefix.backends import cuda
from fastprefix.functional import prefix_attention
from fastprefix.measure.operator.baselines import DECODE_BASELINES, TRAIN_BASELINES, Attend, Candidate
from fastprefix.measure.operator.problem import TRAINED, Leaves, Mode, Problem
from fastprefix.types import BACKENDS, AttentionArgs, BackendName
from fastprefix.verification.routes import no_backward

OURS = "ours"
INTERPRETED = "interpreted: not timed"


def candidates_for(problem: Problem, mode: Mode) -> list[Candidate]:
    """Our operator with ``auto`` and with every other backend that supports the problem, then the CUDA kernels' routes,
    then the baselines.

    The reference backend exists to check the others, so it is a candidate only where ``auto`` takes it.
    """
    baselines = DECODE_BASELINES if mode == "decode" else TRAIN_BASELINES
    return [*_ours(problem, mode), *_routes(problem, mode), *baselines]


def chosen_backend(problem: Problem, mode: Mode = "forward") -> BackendName:
    """The backend that ``auto`` takes for a problem, which has gradients where the mode asks for them.

    FASTPREFIX_BACKEND overrides it, as in ``prefix_attention``.
    """
    named = os.environ.get("FASTPREFIX_BACKEND", "auto")
    for name in BACKENDS:
        if name == named:
            return name
    chosen = dispatch.choose(example_args(problem), "auto", mode if TRAINED[mode] else "forward").module
    return next(name for name in BACKENDS if dispatch.module(name) is chosen)


def backend_reasons(problem: Problem, name: BackendName) -> list[str]:
    """The reasons why a backend does not support the problem; empty where it does."""
    try:
        reasons: list[str] = dispatch.module(name).unsupported(example_args(problem))
    except ImportError as error:
        return [f"cannot be imported: {error}"]
    return reasons


def prepare_with(backend: str) -> Callable[[Problem, Leaves], Attend]:
    """The ``prepare`` of a candidate that calls ``prefix_attention`` with this backend, or with ``auto``."""

    def prepare(problem: Problem, x: Leaves) -> Attend:
        causal = problem.causal
        return lambda: prefix_attention(x.q, x.k, x.v, x.prefix_k, x.prefix_v, causal=causal, backend=backend)

    return prepare


def example_args(problem: Problem) -> AttentionArgs:
    """A call of a problem's sizes, whose tensors hold anything."""
    x, place = problem, {"dtype": problem.dtype, "device": problem.device}
    q = torch.empty(x.B, x.S, x.H, x.D, **place).transpose(1, 2)  # type: ignore[call-overload]
    k = torch.empty(x.B, x.T, x.H_kv, x.D, **place).transpose(1, 2)  # type: ignore[call-overload]
    prefix = torch.empty(x.H_kv, x.P, x.D, **place)  # type: ignore[call-overload]
    return AttentionArgs(q, k, k, prefix, prefix, scale=x.D**-0.5, causal=x.causal)


def _ours(problem: Problem, mode: Mode) -> list[Candidate]:
    chosen = chosen_backend(problem, mode)
    found = [Candidate(OURS, f"prefix_attention, auto takes {chosen}", prepare_with("auto"), _untimed(chosen))]
    for name in BACKENDS:
        if name not in (chosen, "reference") and not backend_reasons(problem, name):
            candidate = Candidate(f"{OURS}:{name}", f"prefix_attention by {name}", prepare_with(name), _untimed(name))
            found.append(candidate)
    return found


def _routes(problem: Problem, mode: Mode) -> list[Candidate]:
    """The CUDA kernels by each of their routes, on devices that they are for; one that cannot run has its reasons."""
    place = torch.device(problem.device).type
    if TRAINED[mode] or (place != "cuda" and not cuda.routes(place)):
        return []
    return [
        Candidate(f"{OURS}:cuda:{route}", f"the CUDA kernels by {route}", _by_route(route), _no_route(route))
        for route in cuda.ROUTES
    ]


def _by_route(route: str) -> Callable[[Problem, Leaves], Attend]:
    """The backend's function alone: the operator itself takes no route, so the work that it does first is left out."""

    def prepare(problem: Problem, x: Leaves) -> Attend:
        args = AttentionArgs(x.q, x.k, x.v, x.prefix_k, x.prefix_v, scale=problem.D**-0.5, causal=problem.causal)
        return lambda: cuda.fwd(args, route)[0]

    return prepare


def _no_route(route: str) -> Callable[[Problem, Mode], str | None]:
    return lambda problem, mode: "; ".join(cuda.unsupported(example_args(problem), route)) or None


def _untimed(backend: BackendName) -> Callable[[Problem, Mode], str | None]:
    """A backend without gradients is not trained with. On a CPU, Triton kernels run in its interpreter, at some 12 ms a
    program: that time says nothing about them.
    """

    def reason(problem: Problem, mode: Mode) -> str | None:
        if TRAINED[mode] and (missing := no_backward(dispatch.module(backend), example_args(problem))):
            return "; ".join(missing)
        return INTERPRETED if backend == "triton" and torch.device(problem.device).type == "cpu" else None

    return reason
