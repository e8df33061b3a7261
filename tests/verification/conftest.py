"""A cache folder of each test's own, children with faults, and a stand-in for a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fastprefix import dispatch
from fastprefix.backends import native
from fastprefix.machine import device
from fastprefix.types import AttentionArgs
from fastprefix.verification import first_use, run, store
from fastprefix.verification.cells import Cell
from fastprefix.verification.identity import identity
from fastprefix.verification.supervisor import Supervisor
from fastprefix.verification.table import Table, Verdict
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


@pytest.fixture(autouse=True)
def without_native(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests tell routes apart by name, whether the extension was built or not; tests/native has its own."""
    monkeypatch.setattr(native, "attend", None)
    monkeypatch.setattr(native, "routes", lambda device_type: ())
    monkeypatch.setattr(native, "preferred", lambda args, mode: False)


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


@pytest.fixture
def examined(monkeypatch: pytest.MonkeyPatch) -> list[list[Cell]]:
    """The cells that each verification was asked for; all are found right for aten's folded route, at once."""
    asked: list[list[Cell]] = []

    def examine(place: torch.device, pairs: dict[Cell, list[str]], *rest: Any) -> tuple[Table, int]:
        asked.append(list(pairs))
        found = Table(identity(place))
        for cell, names in pairs.items():
            for route in names:
                found.add(cell, route, Verdict("right" if route == "aten:folded" else "refused", 0.5, "", "2026-11-27"))
        return found, 0

    monkeypatch.setattr(first_use, "examine", examine)
    return asked


def backend_of(args: AttentionArgs, mode: str = "forward") -> str:
    """What ``auto`` takes: ``aten:folded``."""
    found = dispatch.choose(args, "auto", mode)
    return f"{dispatch.name_of(found.module)}:{found.route}"
