"""A PEFT model of a tiny Llama against the same model patched, in training steps and generation."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from fastprefix.measure.training import peft_vs_patched
from fastprefix.measure.training.peft_vs_patched import PATCHED, PEFT, Workload
from fastprefix.measure.training.random_models import random_llama

BATCH, TOKENS = 8, 32


@cache
def _runs(what: str) -> dict[str, Workload]:
    """Raises AssertionError where PEFT and the patched model do not compute the same."""
    ids = torch.randint(5, 1024, (BATCH, TOKENS), generator=torch.Generator().manual_seed(0))
    match what:
        case "prefix step":
            return peft_vs_patched.prefix_steps(random_llama(), ids, 128)
        case "prompt step":
            return peft_vs_patched.prompt_steps(random_llama(), ids, 64)
        case "mixed step":
            return peft_vs_patched.mixed_steps(random_llama(), ids, 64)
        case _:
            return peft_vs_patched.generations(random_llama(), ids[:, :8], 256, 8)


@pytest.mark.parametrize(
    ("what", "name"),
    [
        *((what, name) for what in ("prefix step", "prompt step", "generation") for name in (PEFT, PATCHED)),
        ("mixed step", "one"),
        ("mixed step", "mixed"),
    ],
)
def test_peft(what: str, name: str, time_it: Callable[[str, Callable[[], Any]], None]) -> None:
    time_it(f"{what}: B{BATCH}", _runs(what)[name])
