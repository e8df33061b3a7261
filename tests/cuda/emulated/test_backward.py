"""The backward for sm_90a in the emulator: right by the fp64 reference, clean in every order, the same bits again."""

from __future__ import annotations

from random import Random

import pytest
import torch

from fastprefix.types import Needs
from tests.cuda.emulated.backward import ALL, Backward, Problem, backward
from tests.cuda.emulated.faults import BF16, PACKED_TEXTS
from tests.cuda.emulated.mutants.backward_mutants import BACKWARD_MUTANTS
from tests.cuda.emulated.mutants.mutant import Mutant
from tests.cuda.emulated.random_calls import random_forward
from tests.emulator.build import library
from tests.emulator.session import Mode
from tests.support.operator_calls import arguments, make_call

pytestmark = pytest.mark.slow


def check(problem: Problem, random: Random) -> None:
    """All gradients, and again in another order; then some of them, with the same bits."""
    multiprocessors, session = random.choice([1, 4, 16, 132]), backward().session
    first = backward()(problem, ALL, multiprocessors=multiprocessors)
    assert not session.errors, (problem.args, session.errors)
    problem.assert_right(first, ALL)
    for needs in (ALL, Needs(*(random.random() < 0.5 for _ in range(5)))):
        mode, seed = random.choice([Mode.LATE, Mode.EAGER, Mode.RANDOM]), random.randrange(1, 1000)
        again = backward()(problem, needs, mode, seed, multiprocessors, random.choice([Mode.LATE, Mode.EAGER]))
        assert not session.errors, (problem.args, session.errors)
        problem.assert_right(again, needs)
        for x, y, need in zip(first, again, needs):
            assert not need or torch.equal(x, y)


@pytest.mark.parametrize("seed", range(4))
def test_any_call(seed: int) -> None:
    random = Random(seed)
    for _ in range(8):
        check(Problem(random_forward(random)), random)


@pytest.mark.exhaustive
@pytest.mark.parametrize("seed", range(100, 110))
def test_any_call_in_hundreds(seed: int) -> None:
    random = Random(seed)
    for _ in range(100):
        check(Problem(random_forward(random)), random)


# More tiles than stages, of keys and of rows; a short prefix whose rows two warpgroups share; and a bank.
CALLS = {
    "long": make_call(B=1, H=2, H_kv=1, S=200, T=330, P=130, **BF16),
    "short prefix": make_call(B=2, H=2, H_kv=1, S=150, T=150, P=16, **BF16),
    "bank": PACKED_TEXTS,
}


@pytest.mark.parametrize("name", CALLS)
def test_the_calls_for_faulty_kernels_are_right_without_faults(name: str) -> None:
    plain, problem = Backward(library("tests/cuda/emulated/mutant_backward.cpp")), Problem(arguments(CALLS[name]))
    found = plain(problem)
    assert not plain.session.errors
    problem.assert_right(found, ALL)


@pytest.mark.parametrize("mutant", BACKWARD_MUTANTS, ids=lambda mutant: mutant.name)
def test_a_faulty_kernel_is_found(mutant: Mutant) -> None:
    source = "tests/cuda/emulated/mutant_backward.cpp"
    faulty = Backward(library(source, kernels=mutant.write(), extra_flags=["-w", "-O0"]))
    problem = Problem(arguments(CALLS[mutant.call]))
    found = faulty(problem)
    if mutant.says:
        assert mutant.is_named_in(faulty.session.errors), faulty.session.errors
    else:
        with pytest.raises(AssertionError):
            problem.assert_right(found, ALL)
