"""The backward of every device in the emulator: right by the fp64 reference, the same bits in every order."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from random import Random

import pytest
import torch

from fastprefix.types import Needs
from tests.cuda.emulated.backward import ALL, Backward, Problem, backward
from tests.cuda.emulated.faults import BF16, PACKED_TEXTS
from tests.cuda.emulated.mutants.backward_mutants import BACKWARD_MUTANTS
from tests.cuda.emulated.mutants.mutant import Mutant, each
from tests.cuda.emulated.mutants.sm80_mutants import SM80_BACKWARD_MUTANTS
from tests.cuda.emulated.random_calls import random_forward
from tests.emulator.build import KERNELS, library
from tests.emulator.session import Mode
from tests.support.operator_calls import arguments, make_call

pytestmark = pytest.mark.slow


def check(problem: Problem, random: Random, capability: int) -> None:
    """All gradients, and again in another order; then some of them, with the same bits."""
    multiprocessors, session = random.choice([1, 4, 16, 132]), backward().session
    first = backward()(problem, ALL, multiprocessors=multiprocessors, capability=capability)
    assert not session.errors, (problem.args, session.errors)
    problem.assert_right(first, ALL)
    for needs in (ALL, Needs(*(random.random() < 0.5 for _ in Needs._fields))):
        mode, seed = random.choice([Mode.LATE, Mode.EAGER, Mode.RANDOM]), random.randrange(1, 1000)
        wgmma_mode = random.choice([Mode.LATE, Mode.EAGER])
        again = backward()(problem, needs, mode, seed, multiprocessors, wgmma_mode, capability)
        assert not session.errors, (problem.args, session.errors)
        problem.assert_right(again, needs)
        for x, y, need in zip(first, again, needs):
            assert not need or x is y or torch.equal(x, y)


both_devices = pytest.mark.parametrize("capability", [80, 90])


@both_devices
@pytest.mark.parametrize("seed", range(2))
def test_any_call(seed: int, capability: int) -> None:
    random = Random(seed)
    for _ in range(8):
        check(Problem(random_forward(random)), random, capability)


@pytest.mark.exhaustive
@both_devices
@pytest.mark.parametrize("seed", range(100, 110))
def test_any_call_in_hundreds(seed: int, capability: int) -> None:
    random = Random(seed)
    for _ in range(100):
        check(Problem(random_forward(random)), random, capability)


# More tiles than stages, of keys and of rows; a short prefix whose rows two warpgroups share; a bank; and a bias that
# makes weights infinite where no log-sum-exp is subtracted.
CALLS = {
    "long": make_call(B=1, H=2, H_kv=1, S=200, T=330, P=130, **BF16),
    "short prefix": make_call(B=2, H=2, H_kv=1, S=150, T=150, P=16, **BF16),
    "bank": PACKED_TEXTS,
    "bias": make_call(B=1, H=4, H_kv=2, S=45, P=15, softcap=2.0, prefix_bias=torch.randn(2, 15) + 200.0, **BF16),
    "padded": make_call(B=1, H=1, H_kv=1, S=40, T=40, P=3, key_padding_mask=torch.arange(40)[None] % 3 > 0, **BF16),
}


def built(capability: int, kernels: Path = KERNELS, flags: Sequence[str] = ()) -> Backward:
    """The kernels of a device, alone."""
    name = "mutant_backward" if capability == 90 else "mutant_sm80"
    return Backward(library(f"tests/cuda/emulated/{name}.cpp", kernels=kernels, extra_flags=flags))


@both_devices
@pytest.mark.parametrize("name", CALLS)
def test_the_calls_for_faulty_kernels_are_right_without_faults(name: str, capability: int) -> None:
    plain, problem = built(capability), Problem(arguments(CALLS[name]))
    found = plain(problem)
    assert not plain.session.errors
    problem.assert_right(found, ALL)


def assert_found(mutant: Mutant, capability: int) -> None:
    faulty = built(capability, mutant.write(), ["-w", "-O0"])
    problem = Problem(arguments(CALLS[mutant.call]))
    found = faulty(problem)
    if mutant.says:
        assert mutant.is_named_in(faulty.session.errors), faulty.session.errors
    else:
        with pytest.raises(AssertionError):
            problem.assert_right(found, ALL)


@pytest.mark.parametrize("mutant", each(BACKWARD_MUTANTS))
def test_a_faulty_kernel_is_found(mutant: Mutant) -> None:
    assert_found(mutant, 90)


@pytest.mark.parametrize("mutant", each(SM80_BACKWARD_MUTANTS))
def test_a_faulty_kernel_for_sm_80_is_found(mutant: Mutant) -> None:
    assert_found(mutant, 80)
