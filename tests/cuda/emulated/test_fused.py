"""The forward of every device in the emulator: right by the fp64 reference, the same bits in every order."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from random import Random

import pytest

from tests.cuda.emulated.calls import Kernels
from tests.cuda.emulated.faults import BF16, PACKED_TEXTS, assert_found, check, faults
from tests.cuda.emulated.mutants.fused_mutants import FUSED_MUTANTS
from tests.cuda.emulated.mutants.mutant import Mutant, each
from tests.cuda.emulated.mutants.sm80_mutants import SM80_FORWARD_MUTANTS
from tests.cuda.emulated.random_calls import random_forward
from tests.emulator.build import KERNELS, library
from tests.support.operator_calls import arguments, make_call
from tests.support.operator_cases import prefix_bias

pytestmark = pytest.mark.slow


both_devices = pytest.mark.parametrize("capability", [80, 90])


@both_devices
@pytest.mark.parametrize("seed", range(4))
def test_any_call(seed: int, capability: int) -> None:
    random = Random(seed)
    for _ in range(12):
        check(random_forward(random), "fused", random, capability)


@pytest.mark.exhaustive
@both_devices
@pytest.mark.parametrize("seed", range(100, 110))
def test_any_call_in_hundreds(seed: int, capability: int) -> None:
    random = Random(seed)
    for _ in range(100):
        check(random_forward(random), "fused", random, capability)


# One has more tiles of keys than stages.
CALLS = {
    "long": make_call(B=1, H=2, H_kv=1, S=100, T=500, P=130, **BF16),
    "packed texts": PACKED_TEXTS,
    "bias": make_call(B=1, H=4, H_kv=2, S=40, T=60, P=130, prefix_bias=prefix_bias(2, 130, hidden=1), **BF16),
}


def built(capability: int, kernels: Path = KERNELS, flags: Sequence[str] = ()) -> Kernels:
    """The kernel of a device, alone."""
    if capability == 90:
        return Kernels(library("tests/cuda/emulated/mutant_fused.cpp", kernels=kernels, extra_flags=flags))
    source = "tests/cuda/emulated/mutant_sm80.cpp"
    return Kernels(library(source, kernels=kernels, extra_flags=flags, defines=["FORWARD"]))


@both_devices
@pytest.mark.parametrize("name", CALLS)
def test_the_calls_for_faulty_kernels_are_right_without_faults(name: str, capability: int) -> None:
    said, wrong = faults(built(capability), arguments(CALLS[name]), "fused")
    assert not said and not wrong


@pytest.mark.parametrize("mutant", each(FUSED_MUTANTS))
def test_a_faulty_kernel_is_found(mutant: Mutant) -> None:
    faulty = built(90, mutant.write(), ["-w", "-O0"])
    assert_found(mutant, *faults(faulty, arguments(CALLS[mutant.call]), "fused"))


@pytest.mark.parametrize("mutant", each(SM80_FORWARD_MUTANTS))
def test_a_faulty_kernel_for_sm_80_is_found(mutant: Mutant) -> None:
    faulty = built(80, mutant.write(), ["-w", "-O0"])
    assert_found(mutant, *faults(faulty, arguments(CALLS[mutant.call]), "fused"))
