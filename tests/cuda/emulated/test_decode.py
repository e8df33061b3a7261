"""Decoding's CUDA kernels in the emulator: right by the fp64 reference, clean in every order, the same bits again."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
import torch

from tests.cuda.emulated.calls import Kernels
from tests.cuda.emulated.faults import assert_found, check, faults
from tests.cuda.emulated.mutants.decode_mutants import DECODE_MUTANTS
from tests.cuda.emulated.mutants.mutant import Mutant, each
from tests.cuda.emulated.random_calls import decode_routes, random_decode
from tests.emulator.build import library
from tests.support.operator_calls import arguments, make_call
from tests.support.operator_cases import prefix_bias

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("seed", range(4))
def test_any_call(seed: int) -> None:
    random = Random(seed)
    for _ in range(8):
        args = random_decode(random)
        for route in decode_routes(args):
            check(args, route, random)


@pytest.mark.exhaustive
@pytest.mark.parametrize("seed", range(100, 110))
def test_any_call_in_hundreds(seed: int) -> None:
    random = Random(seed)
    for _ in range(100):
        args = random_decode(random)
        for route in decode_routes(args):
            check(args, route, random)


# What the emulator gets done in a minute of the sizes that are served: many samples, long prefixes, long contents.
LARGE = [
    {"B": 512, "H": 2, "H_kv": 1, "T": 3, "P": 40},
    {"B": 1, "H": 16, "H_kv": 1, "T": 3, "P": 32_768},
    {"B": 1, "H": 3, "H_kv": 1, "T": 32_768, "P": 5},
]


@pytest.mark.exhaustive
@pytest.mark.parametrize("sizes", LARGE, ids=str)
def test_large_calls(sizes: dict[str, int]) -> None:
    args = arguments(make_call(S=1, D=128, dtype=torch.bfloat16, **sizes))
    for route in decode_routes(args):
        check(args, route, Random(0))


BF16: dict[str, Any] = {"D": 64, "dtype": torch.bfloat16}
# Each has something that another has not: several shares, tiles of 16 and of 64 rows, prefixes of a bank without rows
# and rows without a prefix, more prefixes than threads.
CALLS = {
    "shares": make_call(B=3, H=4, H_kv=2, S=1, T=300, P=300, **BF16),
    "many rows": make_call(B=2, H=20, H_kv=2, S=2, T=200, P=20, **BF16),
    "ragged bank": make_call(
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
    "bias": make_call(B=2, H=4, H_kv=2, S=1, T=70, P=200, prefix_bias=prefix_bias(2, 200, hidden=3), **BF16),
    "large bank": make_call(B=4, H=2, H_kv=2, S=1, T=9, P=16, N=300, prefix_ids=torch.tensor([7, 290, 7, -1]), **BF16),
}


def plain() -> Kernels:
    return Kernels(library("tests/cuda/emulated/mutant_decode.cpp"))


@pytest.mark.parametrize("name", CALLS)
def test_the_calls_for_faulty_kernels_are_right_without_faults(name: str) -> None:
    args = arguments(CALLS[name])
    for route in decode_routes(args):
        said, wrong = faults(plain(), args, route)
        assert not said and not wrong


@pytest.mark.parametrize("mutant", each(DECODE_MUTANTS))
def test_a_faulty_kernel_is_found(mutant: Mutant) -> None:
    faulty = Kernels(
        library("tests/cuda/emulated/mutant_decode.cpp", kernels=mutant.write(), extra_flags=["-w", "-O0"])
    )
    args = arguments(CALLS[mutant.call])
    assert_found(mutant, *faults(faulty, args, decode_routes(args)[-1]))
