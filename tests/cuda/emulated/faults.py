"""Calls in the emulator: of kernels as they are, in every order, and of kernels with a fault."""

from __future__ import annotations

from random import Random
from typing import Any

import torch

from fastprefix.types import AttentionArgs
from tests.cuda.emulated.calls import Kernels, kernels
from tests.cuda.emulated.mutants.mutant import Mutant
from tests.cuda.emulated.random_calls import assert_right
from tests.emulator.session import Mode
from tests.support.operator_calls import make_call

BF16: dict[str, Any] = {"D": 128, "dtype": torch.bfloat16}
# Rows of several prompts and documents in a tile, of a bank whose prefixes end within tiles.
PACKED_TEXTS = make_call(
    B=1,
    H=2,
    H_kv=1,
    S=130,
    T=130,
    P=100,
    N=3,
    prefix_ids=torch.tensor([[2] * 50 + [-1] * 20 + [0] * 60]),
    prefix_lens=torch.tensor([100, 3, 70]),
    segment_ids=torch.tensor([[0] * 50 + [1] * 20 + [2] * 60]),
    **BF16,
)


def faults(faulty: Kernels, args: AttentionArgs, route: str, capability: int = 90) -> tuple[list[str], bool]:
    """The emulator's errors, and whether a result is wrong, on machines of two sizes."""
    said: list[str] = []
    wrong = False
    for multiprocessors in (2, 132):
        o, lse = faulty(args, route, multiprocessors=multiprocessors, capability=capability)
        said += faulty.session.errors
        try:
            assert_right(args, o, lse)
        except AssertionError:
            wrong = True
        if said or wrong:
            break
    return said, wrong


def assert_found(mutant: Mutant, said: list[str], wrong: bool) -> None:
    """By its name; or, where the machine obeys and the numbers are wrong, by those."""
    if mutant.says:
        assert mutant.is_named_in(said), said
    else:
        assert wrong


def check(args: AttentionArgs, route: str, random: Random, capability: int = 90) -> None:
    """Right, clean, and the same bits whatever the order of blocks, warps and copies."""
    multiprocessors, session = random.choice([1, 4, 16, 132]), kernels().session
    first = kernels()(args, route, Mode.LATE, 0, multiprocessors, capability=capability)
    assert not session.errors, (args, route, session.errors)
    assert_right(args, *first)
    modes = random.choice([Mode.LATE, Mode.EAGER, Mode.RANDOM]), random.randrange(1, 1000)
    again = kernels()(args, route, *modes, multiprocessors, random.choice([Mode.LATE, Mode.EAGER]), capability)
    assert not session.errors, (args, route, session.errors)
    for x, y in zip(first, again):
        assert torch.equal(x, y)
