"""A training step of a tiny Llama: ours, PEFT's and the frozen model's, and the bytes each saves for backward."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from fastprefix.measure.training.compare_steps import FROZEN, OURS, PEFT, build_steps
from fastprefix.measure.training.random_models import random_llama
from fastprefix.measure.training.training_step import TrainingStep

BATCH, TOKENS = 8, 64


@cache
def _steps(num_virtual_tokens: int) -> dict[str, TrainingStep]:
    """Raises AssertionError where ours and PEFT do not compute the same loss."""
    ids = torch.randint(0, 1024, (BATCH, TOKENS), generator=torch.Generator().manual_seed(0))
    return build_steps(random_llama(), ids, num_virtual_tokens)


@pytest.mark.parametrize("name", [OURS, PEFT, FROZEN])
@pytest.mark.parametrize("num_virtual_tokens", [16, 512])
def test_step(
    num_virtual_tokens: int, name: str, time_it: Callable[[str, Callable[[], Any]], None], benchmark: Any
) -> None:
    step = _steps(num_virtual_tokens)[name]
    benchmark.extra_info["saved_mib"] = step.saved_bytes() / 2**20
    time_it(f"training step: B{BATCH} S{TOKENS} P{num_virtual_tokens}", step)
