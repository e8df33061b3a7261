"""Measurements time the CUDA kernels by each of their routes, and say why one is not timed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastprefix.backends import cuda
from fastprefix.measure import Mode, Problem, candidates_for, measure

BF16 = torch.bfloat16
DECODE, TRAIN = Problem.decode(3, 4, 2, 9, 17, 16, dtype=BF16), Problem.train(2, 4, 2, 24, 17, 16, dtype=BF16)
ROUTES = {f"ours:cuda:{route}" for route in cuda.ROUTES}


def names(problem: Problem, mode: Mode) -> set[str]:
    return {x.name for x in candidates_for(problem, mode)}


@pytest.mark.parametrize(("problem", "mode"), [(DECODE, "decode"), (TRAIN, "forward")])
def test_each_route_is_timed(plain: Path, problem: Problem, mode: Mode) -> None:
    found = measure(problem, mode, repeats=2, only=[*ROUTES, "ours:cuda", "cat_sdpa", "cache_sdpa"])
    assert found.wrong == []
    decoding = {"ours:cuda:split_kv", "ours:cuda:cascade"}
    assert ROUTES & set(found.timings) == (ROUTES if problem is DECODE else ROUTES - decoding)
    for name in decoding - set(found.timings):
        assert found.failures[name].startswith("q: 24 tokens, at most 16 are decoded")
    assert "ours:cuda" in found.timings


def test_nothing_is_trained_by_them(plain: Path) -> None:
    assert not names(TRAIN, "backward") & ROUTES
    wide = Problem.train(2, 4, 2, 16, 17, 256, dtype=BF16)  # decoding takes such heads, and the backward does not
    found = measure(wide, "backward", repeats=2, only=["ours:cuda", "cat_sdpa"])
    assert found.failures["ours:cuda"].startswith("gradients: q: head dim 256")


def test_a_processor_has_no_routes_of_theirs() -> None:
    assert not names(DECODE, "decode") & ROUTES
