"""Any call that the operator documents, and any layout of its tensors, through the operators and the emulator."""

from __future__ import annotations

from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastprefix.backends import cuda
from tests.cuda.emulated.layouts import lay_out
from tests.cuda.emulated.operators import ROUTES, Emulated, emulated, routes_of
from tests.cuda.emulated.random_calls import assert_right, random_decode, random_forward
from tests.cuda.test_calls import assert_right as assert_call_is_right
from tests.operator.test_fuzz import FULL, QUICK, valid
from tests.support.operator_calls import Call

pytestmark = pytest.mark.slow


def in_half_precision(call: Call, dtype: torch.dtype) -> Call:
    """Without what the kernels do not take: a bias, and head dims that are no multiples of 8."""
    options = {name: x for name, x in call.to(dtype).options.items() if name != "bias"}
    options.setdefault("scale", call.leaves["q"].shape[3] ** -0.5)
    if "sinks" in options:
        options["sinks"] = options["sinks"].detach().float()
    leaves = {name: x.detach().to(dtype) for name, x in call.leaves.items()}
    return Call({n: torch.nn.functional.pad(x, (0, -x.shape[-1] % 8)) for n, x in leaves.items()}, options)


def check(profile: settings) -> None:
    @profile
    @given(valid(), *map(st.sampled_from, (ROUTES, (torch.bfloat16, torch.float16), (1, 4, 132))))
    def every(call: Call, route: str, dtype: torch.dtype, multiprocessors: int) -> None:
        call = in_half_precision(call, dtype)
        route = route if route in routes_of(call) else "fused"  # which takes them all: each call that is drawn runs
        with emulated(route) as here:
            here.multiprocessors = multiprocessors
            assert_call_is_right(call, route)

    every()


def test_any_call() -> None:
    check(QUICK)


@pytest.mark.exhaustive
def test_any_call_in_thousands() -> None:
    check(FULL)


def check_layouts(here: Emulated, seeds: range) -> None:
    for seed in seeds:
        random = Random(seed)
        args = lay_out(random_forward(random) if here.route == "fused" else random_decode(random), random)
        if cuda.unsupported(args, here.route):
            continue
        here.multiprocessors = random.choice([1, 4, 132])
        assert_right(args, *here.fwd(args))


def test_any_layout(emulated: Emulated) -> None:
    check_layouts(emulated, range(25))


@pytest.mark.exhaustive
def test_any_layout_in_hundreds(emulated: Emulated) -> None:
    check_layouts(emulated, range(1000, 1500))
