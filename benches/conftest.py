"""Fixtures of the microbenchmarks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def time_it(benchmark: Any) -> Callable[[str, Callable[[], Any]], None]:
    """``time_it(group, fn)`` times a fixed number of rounds and reports it with the others of the group."""

    def run(group: str, fn: Callable[[], Any]) -> None:
        benchmark.group = group
        benchmark.pedantic(fn, rounds=7, iterations=1, warmup_rounds=2)

    return run
