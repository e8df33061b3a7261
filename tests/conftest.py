"""Fixtures that every stage shares."""

from __future__ import annotations

import os

import pytest
import torch

# Read when a kernel is first imported: without a GPU its interpreter judges the kernels.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from fastprefix.types import BACKENDS


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend in turn; no test names one."""
    return str(request.param)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
