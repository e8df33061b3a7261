"""The backend ``cuda`` on tensors of a processor: torch's operators, and behind them the kernels in the emulator.

So a call goes the whole way that it goes on a GPU: ``prefix_attention``, ``fastprefix/backends/cuda.py``,
``csrc/cuda/operators.cpp``, ``kernels/cuda``. In tests this is the backend ``cuda-emulated``, by one of its routes.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastprefix.backends import cuda
from fastprefix.cuda_library import build
from fastprefix.errors import UnsupportedError
from fastprefix.types import AttentionArgs
from tests.cuda.emulated.calls import kernels
from tests.cuda.libraries import OPERATORS, TORCH
from tests.emulator.build import library
from tests.emulator.session import Mode, Session
from tests.support.operator_calls import Call, arguments

NAMESPACE = "fastprefix_emulated"
# The route ``fused`` by the kernels for devices other than Hopper.
SM80 = "fused_sm80"
ROUTES = (*cuda.ROUTES, SM80)


@functools.cache
def operators() -> Path:
    """The library of the operators, which loads the library of all kernels that other tests call without torch."""
    first, *more = sorted(OPERATORS.glob("*.cpp"))
    made = Path(kernels().library._name)
    flags = [*(x for x in build.HOST if x.startswith("-D")), f"-I{OPERATORS}", f"-isystem{TORCH / 'include'}"]
    flags += [str(made), f"-Wl,-rpath,{made.parent}", f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-ldl"]
    names = ("FASTPREFIX_EMULATED", f"FASTPREFIX_LIBRARY={NAMESPACE}")
    return library(first, sources=more, defines=names, extra_flags=flags)


@dataclass
class Emulated:
    """A route that every call takes, and how the emulator runs the calls that follow."""

    route: str
    session: Session
    mode: Mode = Mode.LATE
    seed: int = 0
    multiprocessors: int = 4
    capability: int = 90

    def fwd(self, args: AttentionArgs, route: str | None = None) -> tuple[Tensor, Tensor]:
        """In place of the backend's own ``fwd``: by this route, or the reasons why the route cannot."""
        if reasons := cuda.unsupported(args, self.route):
            raise UnsupportedError("; ".join(reasons))
        options = {"multiprocessors": self.multiprocessors, "capability": self.capability}
        self.session.reset(mode=self.mode, seed=self.seed, **options)
        found = _fwd(args, self.route)
        assert not self.session.errors, self.session.errors
        assert self.session.counters.blocks or not found[0].numel()
        return found


_fwd = cuda.fwd


@contextmanager
def emulated(route: str) -> Iterator[Emulated]:
    """``backend="cuda"`` is the emulator in the block, by one of ``ROUTES``."""
    with cuda.emulated(str(operators()), NAMESPACE), pytest.MonkeyPatch.context() as patch:
        here = Emulated(route, kernels().session)
        if route == SM80:
            here.route, here.capability = "fused", 80
        patch.setattr(cuda, "fwd", here.fwd)
        yield here


def routes_of(call: Call) -> list[str]:
    """The routes that take a call, which is in half precision; nothing is compiled for the question."""
    options = {name: x for name, x in call.options.items() if name != "gate"}  # two calls of the operator without one
    args = arguments(Call(call.leaves, options).to(torch.bfloat16))
    with cuda.emulated(None):
        return [route for route in ROUTES if not cuda.unsupported(args, "fused" if route == SM80 else route)]


def emulated_param(*values: Any, route: str) -> Any:
    """A parameter set that ends with a route, for a fixture that gets it indirectly. A compiler runs."""
    name = "-".join([*map(str, values), f"cuda-emulated:{route}"])
    return pytest.param(*values, route, id=name, marks=pytest.mark.slow)


def each_route(calls: Iterable[tuple[Any, Call]]) -> list[Any]:
    """Parameters ``case, route``: each of the named calls by all routes that take it."""
    return [emulated_param(name, route=route) for name, call in calls for route in routes_of(call)]
