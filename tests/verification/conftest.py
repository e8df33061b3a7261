"""A cache folder of each test's own, children with faults, and a stand-in for a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from fastprefix.machine import device
from fastprefix.verification import first_use, run, store
from fastprefix.verification.supervisor import Supervisor
from tests.verification import faulty_worker


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Nothing is known, and what is found out is kept here."""
    monkeypatch.setenv("FASTPREFIX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("FASTPREFIX_VERIFY", "first-use")
    monkeypatch.setattr(first_use, "_tried", set())
    monkeypatch.setattr(first_use, "_hopeless", set())
    monkeypatch.setattr(first_use, "_told", set())
    monkeypatch.setattr(store, "_unwritable", set())
    store.forget()
    yield tmp_path / "cache"
    store.forget()


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, str]], None]:
    """Give routes faults in every child that starts from now on; a child that is silent hangs after seconds."""

    def give(found: dict[str, str]) -> None:
        monkeypatch.setattr(Supervisor, "command", faulty_worker.command(found))
        monkeypatch.setitem(run.PATIENCE, "cpu", 6.0)

    return give


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> str:
    """The processor passes for a GPU: its kind, name and driver. Returns the name."""
    name = "NVIDIA Stand-in"
    monkeypatch.setattr(device, "kind", lambda place: "cuda")
    monkeypatch.setattr(device, "name", lambda place: name)
    monkeypatch.setattr(device, "capability", lambda place: "sm_90")
    monkeypatch.setattr(device, "driver", lambda place: "580.65")
    monkeypatch.setattr(device, "free_memory", lambda place: 2**34)
    monkeypatch.setattr(device, "is_capturing", lambda place: False)
    monkeypatch.setattr(device, "index", lambda place: 0)
    return name


CPU = torch.device("cpu")
