"""Fixtures that every stage shares."""

from __future__ import annotations

import pytest
import torch

from fastprefix.types import BACKENDS


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend in turn; no test names one."""
    return str(request.param)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
