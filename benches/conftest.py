"""What the microbenchmarks share."""

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
    """``time_it(group, fn)``: a fixed number of rounds, beside everything else of the group in the report."""

    def run(group: str, fn: Callable[[], Any]) -> None:
        benchmark.group = group
        benchmark.pedantic(fn, rounds=7, iterations=1, warmup_rounds=2)

    return run
