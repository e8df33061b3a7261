"""The forward for sm_90a in the emulator: right by the fp64 reference, clean in every order, the same bits again."""

from __future__ import annotations

from random import Random

import pytest

from tests.cuda.emulated.calls import Kernels
from tests.cuda.emulated.faults import BF16, PACKED_TEXTS, assert_found, check, faults
from tests.cuda.emulated.mutants.fused_mutants import FUSED_MUTANTS
from tests.cuda.emulated.mutants.mutant import Mutant
from tests.cuda.emulated.random_calls import random_forward
from tests.emulator.build import library
from tests.support.operator_calls import arguments, make_call

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("seed", range(4))
def test_any_call(seed: int) -> None:
    random = Random(seed)
    for _ in range(12):
        check(random_forward(random), "fused", random)


@pytest.mark.exhaustive
@pytest.mark.parametrize("seed", range(100, 110))
def test_any_call_in_hundreds(seed: int) -> None:
    random = Random(seed)
    for _ in range(100):
        check(random_forward(random), "fused", random)


# One has more tiles of keys than stages.
CALLS = {
    "long": make_call(B=1, H=2, H_kv=1, S=100, T=500, P=130, **BF16),
    "packed texts": PACKED_TEXTS,
}


@pytest.mark.parametrize("name", CALLS)
def test_the_calls_for_faulty_kernels_are_right_without_faults(name: str) -> None:
    said, wrong = faults(Kernels(library("tests/cuda/emulated/mutant_fused.cpp")), arguments(CALLS[name]), "fused")
    assert not said and not wrong


@pytest.mark.parametrize("mutant", FUSED_MUTANTS, ids=lambda mutant: mutant.name)
def test_a_faulty_kernel_is_found(mutant: Mutant) -> None:
    faulty = Kernels(library("tests/cuda/emulated/mutant_fused.cpp", kernels=mutant.write(), extra_flags=["-w", "-O0"]))
    assert_found(mutant, *faults(faulty, arguments(CALLS[mutant.call]), "fused"))
