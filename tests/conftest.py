"""Fixtures that every stage shares."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# Read when a kernel is first imported: without a GPU its interpreter judges the kernels.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# What the package would find out about this machine at first use is tested in tests/verification.
os.environ["FASTPREFIX_VERIFY"] = "off"

from fastprefix.backends import native
from tests.support.operator_calls import GENERAL, backend_params


def pytest_collection_finish(session: pytest.Session) -> None:
    """Leave what imports have made out of garbage collection, which took a quarter of the time to look at it."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Let libraries see their objects go."""
    gc.unfreeze()


@pytest.fixture(params=backend_params(GENERAL))
def backend(request: pytest.FixtureRequest) -> str:
    """Every general backend in turn; no test names one. One that was not built is skipped with the reason."""
    name = str(request.param)
    if name == "native" and native.ABSENCE:
        pytest.skip(native.ABSENCE)
    return name


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Uninitialised memory is NaN, so that what a kernel forgets to write is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()
