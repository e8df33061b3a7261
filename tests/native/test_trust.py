"""When ``auto`` takes the C++ kernels: unproved on a processor, until a table says otherwise."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fastprefix import dispatch, explain, prefix_attention
from fastprefix.backends import native
from fastprefix.verification import lookup, store
from fastprefix.verification.cells import cell_of
from fastprefix.verification.identity import identity
from fastprefix.verification.table import Table, Verdict
from tests.support.operator_calls import arguments, make_call

pytestmark = pytest.mark.usefixtures("native", "cache")
CPU = torch.device("cpu")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing is known, and the kernels are expected to be fast whatever this processor has."""
    monkeypatch.setenv("FASTPREFIX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("FASTPREFIX_VERIFY", "first-use")
    monkeypatch.setattr(native, "preferred", lambda args, mode: True)
    store.forget()
    yield
    store.forget()


def found(result: str, direction: str = "forward", **call: int) -> Table:
    args = arguments(make_call(**call))
    cell = cell_of(args, direction)  # type: ignore[arg-type]
    return Table(identity(CPU), {cell: {"native:fused": Verdict(result, 0.5, "", "2026-11-28")}})  # type: ignore[arg-type]


def test_unproved_it_comes_first() -> None:
    args = arguments(make_call(S=32))
    assert lookup.order(args, "forward") == (lookup.NATIVE, lookup.VENDOR, lookup.REFERENCE)
    assert dispatch.choose(args, "auto") == lookup.NATIVE


def test_what_it_cannot_take_is_the_vendors() -> None:
    args = arguments(make_call(S=32, dtype=torch.float64))
    assert dispatch.choose(args, "auto") == lookup.VENDOR
    assert "dtype torch.float64" in explain(**make_call(dtype=torch.float64).leaves)


def test_where_it_was_wrong_it_is_not_taken_again_at_once() -> None:
    """Neither there nor, unproved, elsewhere in the dtype; and the direct call knows."""
    x = {name: leaf.detach() for name, leaf in make_call(S=32).leaves.items()}
    before = prefix_attention(**x)
    assert native.attend(*x.values(), True, *[None] * 11, "auto", False) is not True
    store.add(CPU, found("wrong", S=32))
    assert native.attend(*x.values(), True, *[None] * 11, "auto", False) is True
    for call in (make_call(S=32), make_call(S=32, D=32)):
        assert dispatch.choose(arguments(call), "auto") == lookup.VENDOR
    torch.testing.assert_close(prefix_attention(**x), before)
    assert lookup.order(arguments(make_call(S=32, dtype=torch.bfloat16)), "forward")[0] == lookup.NATIVE


def test_it_is_not_expected_to_be_fast_with_plain_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(native, "_VECTORS", "baseline")
    assert not native.preferred(arguments(make_call()), "forward")
    assert lookup.unproved(arguments(make_call()), "forward") == (lookup.VENDOR, lookup.REFERENCE)


def test_a_decision_for_training_serves_the_calls_without_gradients() -> None:
    call = make_call(S=9)
    prefix_attention(**call.leaves).sum().backward()
    with torch.no_grad():
        x = [leaf.detach() for leaf in call.leaves.values()]
        assert native.attend(*x, True, *[None] * 11, "auto", False) is not True
