"""Decoding's CUDA kernels in the emulator: right by the fp64 reference, clean in every order, the same bits again."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
import torch

from fastprefix.types import AttentionArgs
from tests.cuda.emulated_decode import Decode, decode
from tests.cuda.mutants import DECODE, Mutant
from tests.cuda.random_decodes import assert_right, random_decode, routes
from tests.emulator.build import library
from tests.emulator.session import Mode
from tests.support.operator_calls import arguments, make_call

MODES = tuple(Mode)


def check(args: AttentionArgs, random: Random) -> None:
    """By each route, twice: bits do not depend on the order of blocks, warps and copies."""
    for route in routes(args):
        multiprocessors = random.choice([1, 4, 16, 132])
        first = decode()(args, route, Mode.LATE, 0, multiprocessors)
        assert not decode().session.errors, (args, route, decode().session.errors)
        assert_right(args, *first)
        again = decode()(args, route, random.choice(MODES), random.randrange(1, 1000), multiprocessors)
        assert not decode().session.errors, (args, route, decode().session.errors)
        for x, y in zip(first, again):
            assert torch.equal(x, y)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_any_call(seed: int) -> None:
    random = Random(seed)
    for _ in range(8):
        check(random_decode(random), random)


@pytest.mark.exhaustive
@pytest.mark.parametrize("seed", range(100, 108))
def test_any_call_in_hundreds(seed: int) -> None:
    random = Random(seed)
    for _ in range(70):
        check(random_decode(random), random)


BF16: dict[str, Any] = {"D": 64, "dtype": torch.bfloat16}
# Each has something that another has not: several shares, tiles of 16 and of 64 rows, prefixes of a bank without rows
# and rows without a prefix, more prefixes than threads.
CALLS = {
    "shares": lambda: make_call(B=3, H=4, H_kv=2, S=1, T=300, P=300, **BF16),
    "ragged bank": lambda: make_call(
        B=6,
        H=16,
        H_kv=2,
        S=1,
        T=70,
        P=150,
        N=3,
        prefix_ids=torch.tensor([2, -1, 0, 2, 2, 0]),
        prefix_lens=torch.tensor([150, 3, 90]),
        **BF16,
    ),
    "many rows": lambda: make_call(B=2, H=20, H_kv=2, S=2, T=200, P=20, **BF16),
    "large bank": lambda: make_call(
        B=4, H=2, H_kv=2, S=1, T=9, P=16, N=300, prefix_ids=torch.tensor([7, 290, 7, -1]), **BF16
    ),
}


def faults(kernels: Decode) -> tuple[list[str], bool]:
    """What the emulator says of all calls, and whether any result is wrong."""
    said: list[str] = []
    wrong = False
    for make in CALLS.values():
        args = arguments(make())
        for route in routes(args):
            for multiprocessors in (2, 8, 132):
                o, lse = kernels(args, route, multiprocessors=multiprocessors)
                said += kernels.session.errors
                try:
                    assert_right(args, o, lse)
                except AssertionError:
                    wrong = True
    return said, wrong


def test_the_calls_for_faulty_kernels_are_right_without_faults() -> None:
    said, wrong = faults(Decode(library("tests/cuda/mutant_decode.cpp")))
    assert not said and not wrong


@pytest.mark.slow
@pytest.mark.parametrize("mutant", DECODE, ids=lambda mutant: mutant.name)
def test_a_faulty_kernel_is_found(mutant: Mutant) -> None:
    said, wrong = faults(Decode(library("tests/cuda/mutant_decode.cpp", kernels=mutant.write(), extra_flags=["-w"])))
    if mutant.says:
        assert mutant.is_named_in(said), said
    else:
        assert wrong
