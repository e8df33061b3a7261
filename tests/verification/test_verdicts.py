"""Each way in which a backend can be wrong gets its verdict, harms no one, and is not chosen."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fastprefix import dispatch, explain, prefix_attention
from fastprefix.types import AttentionArgs
from fastprefix.verification import lookup, run, store
from fastprefix.verification.cells import ANY, Cell
from fastprefix.verification.routes import routes
from fastprefix.verification.table import Bucket, Table
from tests.support.operator_calls import arguments, make_call
from tests.verification.conftest import CPU

pytestmark = pytest.mark.slow

Faults = Callable[[dict[str, str]], None]
CELLS = [Cell(direction, "fp32", 16, 16, 3, ANY, ("causal",)) for direction in ("forward", "backward", "decode")]
TIMED = [Bucket(mode, "fp32", 16, "plain", 2, 6, 2, 32, 32, 8) for mode in ("forward", "backward", "lowest")]


def examined(cells: list[Cell] = CELLS, buckets: list[Bucket] = TIMED, budget: float = 600.0) -> Table:
    """What is found on the processor, which is then what ``auto`` reads."""
    pairs = {cell: routes("cpu", cell.direction) for cell in cells}
    found, left = run.examine(CPU, pairs, buckets, budget)
    assert left == 0
    store.add(CPU, found)
    return found


def call(seq: int = 32) -> AttentionArgs:
    """A call of the cells above."""
    return arguments(make_call(S=seq, P=8))


def results(found: Table, route: str) -> dict[str, str]:
    """A route's results by direction."""
    return {cell.direction: verdicts[route].result for cell, verdicts in found.verdicts.items() if route in verdicts}


def chosen(mode: str = "forward") -> str:
    """The route that ``auto`` takes, ``aten:folded``."""
    found = dispatch.choose(call(), "auto", mode)
    return f"{dispatch.name_of(found.module)}:{found.route}"


def assert_caller_lives() -> None:
    """The caller's own call is right, whatever became of the children."""
    given = make_call(S=32, P=8)
    got, want = (prefix_attention(**given.leaves, backend=name) for name in ("auto", "reference"))
    torch.testing.assert_close(got, want)


def test_three_backends_for_real() -> None:
    found = examined()
    right = {"forward": "right", "backward": "right"}
    for route in ("aten:concatenated", "aten:folded", "aten:packed", "triton:fused"):
        assert results(found, route) == {**right, "decode": "right"}, route
    assert results(found, "triton:split") == {"decode": "right"}
    assert all(0 < v.worst <= 1 for vs in found.verdicts.values() for v in vs.values() if v.worst is not None)
    assert all({"reference", "aten:folded"} <= times.keys() for times in found.times.values())
    assert chosen().startswith("aten:") and chosen("backward").startswith("aten:")
    assert not any(candidate.module.__name__.endswith("triton") for candidate in lookup.order(call(), "forward"))
    told = explain(**make_call(S=32, P=8).leaves)
    assert "chosen by auto: " in told and "of the rule, " in told and "x the next (" in told
    assert "fused, proved on " in told and "not timed" in told


WRONG = {
    "aten:concatenated": ("sign", "wrong", "error"),
    "aten:folded": ("nan", "wrong", "nan"),
    "triton:fused": ("another time", "wrong", "other bits in a second run"),
    "triton:split": ("unwritten", "wrong", "nan"),
}
ENDED = {
    "aten:concatenated": ("segfault", "crashed", "SIGSEGV"),
    "aten:folded": ("abort", "crashed", "SIGABRT: LLVM ERROR: Cannot select"),
    "triton:fused": ("exit", "crashed", "exit status 0"),
    "triton:split": ("exception", "failed", "ValueError: no kernel image"),
}


@pytest.mark.parametrize("found", [WRONG, ENDED])
def test_a_fault_is_a_verdict(found: dict[str, tuple[str, str, str]], faults: Faults) -> None:
    """Of aten's routes one is right; it is taken, and the others of the same child were not disturbed."""
    faults({route: fault for route, (fault, _, _) in found.items()})
    table = examined()
    for route, (_, result, detail) in found.items():
        assert set(results(table, route).values()) == {result}, route
        details = [verdicts[route].detail for verdicts in table.verdicts.values() if route in verdicts]
        assert any(detail in told for told in details), details
        assert all(route not in times for times in table.times.values())
    assert results(table, "aten:packed") == dict.fromkeys(("forward", "backward", "decode"), "right")
    assert chosen() == chosen("backward") == chosen("lowest") == "aten:packed"
    told = explain(**make_call(S=32, P=8).leaves)
    assert "chosen by auto: packed, proved on" in told and f"folded, {found['aten:folded'][1]} on " in told
    if found is ENDED:  # at the second end of its process a route is given up
        details = [verdicts["aten:folded"].detail for verdicts in table.verdicts.values()]
        assert sum("not tried" in told for told in details) == len(CELLS) - 2
    assert_caller_lives()


def test_a_route_that_hangs(faults: Faults) -> None:
    faults({"aten:packed": "hang"})
    found, _ = run.examine(CPU, {cell: ["aten:packed", "aten:folded"] for cell in CELLS}, [], 600.0)
    assert set(results(found, "aten:packed").values()) == {"hung"}  # the last was not tried, after two
    assert set(results(found, "aten:folded").values()) == {"right"}
    assert_caller_lives()


def test_one_that_is_right_and_slow_is_chosen_last(faults: Faults) -> None:
    faults({"aten:folded": "slow", "aten:concatenated": "slow"})
    found = examined()
    assert set(results(found, "aten:folded").values()) == {"right"}
    assert chosen() == "aten:packed"
    assert "chosen by auto: packed, proved on" in explain(**make_call(S=32, P=8).leaves)


def test_nothing_is_right(faults: Faults) -> None:
    faults({f"aten:{route}": "sign" for route in ("concatenated", "folded", "packed")})
    examined()
    assert chosen() == "reference:None"
    # Nothing is known of other cells, but these kernels are not trusted any more.
    other = arguments(make_call(S=32, P=8, D=24))
    assert dispatch.choose(other, "auto").module is dispatch.module("reference")
    assert_caller_lives()


def test_one_that_fails_while_it_is_timed(faults: Faults, monkeypatch: pytest.MonkeyPatch) -> None:
    healthy = run.Supervisor.command
    asked = run.Supervisor.run

    def ill_when_timed(self: run.Supervisor, groups: list[list[run.Task]], *rest: object) -> object:
        if groups and "time" in groups[0][0].message:
            self.close()
            faults({"aten:folded": "segfault"})
        return asked(self, groups, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(run.Supervisor, "run", ill_when_timed)
    found = examined(CELLS[:1], TIMED[:1])
    assert healthy is not run.Supervisor.command
    verdict = found.failures[TIMED[0]]["aten:folded"]
    assert verdict.result == "crashed" and verdict.detail.startswith("while timed on forward fp32 D16")
    assert chosen() in ("aten:concatenated", "aten:packed", "aten:None")


def test_an_end_between_the_rounds_of_a_timing_is_nobodys(faults: Faults) -> None:
    """Several routes run in turns then, and no message says which: the bucket has no times, and no route is blamed."""
    faults({"aten:folded": "dies late"})
    found = examined(CELLS[:1], TIMED[:1])
    assert not found.times and results(found, "aten:folded") == {"forward": "right"}
    assert_caller_lives()


@pytest.mark.parametrize(
    ("fault", "result", "detail"),
    [
        ("wrong when large", "wrong", "error"),
        ("raises when large", "failed", "RuntimeError: out of resource: shared memory"),
    ],
)
def test_one_that_is_not_right_on_larger_calls(fault: str, result: str, detail: str, faults: Faults) -> None:
    faults({"aten:folded": fault})
    found = examined(CELLS[:1], TIMED[:1])
    verdict = found.failures[TIMED[0]]["aten:folded"]
    assert verdict.result == result and detail in verdict.detail
    assert verdict.detail.startswith("while timed on forward fp32 D16 plain B2 H6 H_kv2")
    assert chosen() in ("aten:concatenated", "aten:packed")
    assert_caller_lives()
    assert f"folded, {result} on" in explain(**make_call(S=32, P=8).leaves)


@pytest.mark.parametrize("fault", ["no memory", "killed"])
def test_no_memory_and_a_kill_are_no_verdict(fault: str, faults: Faults) -> None:
    faults({"aten:folded": fault})
    pairs = {CELLS[0]: ["aten:folded", "aten:packed"]}
    found, _ = run.examine(CPU, pairs, [], 600.0)
    assert found.verdicts[CELLS[0]].keys() == {"aten:packed"}
    assert not found.bad()


def test_what_was_found_before_no_child_starts_any_more(faults: Faults, monkeypatch: pytest.MonkeyPatch) -> None:
    """A route that crashes may leave the device so that no other process can use it."""
    faults({"aten:folded": "segfault"})
    first = run.Supervisor.command
    started: list[int] = []

    def once(self: run.Supervisor) -> list[str]:
        started.append(1)
        return first(self) if len(started) == 1 else ["false"]

    monkeypatch.setattr(run.Supervisor, "command", once)
    found, left = run.examine(CPU, {cell: routes("cpu", cell.direction) for cell in CELLS}, [], 600.0)
    assert found.verdicts[CELLS[0]]["aten:folded"].result == "crashed" and left > 0


def test_what_libraries_print_is_no_answer(faults: Faults, capfd: pytest.CaptureFixture[str]) -> None:
    faults({"aten:folded": "talk", "aten:packed": "chatty"})
    assert results(examined(CELLS[:1], []), "aten:folded") == {"forward": "right"}
    assert "a library prints this" not in "".join(capfd.readouterr())


def test_a_budget_is_kept() -> None:
    pairs = {cell: routes("cpu", cell.direction) for cell in CELLS}
    found, left = run.examine(CPU, pairs, TIMED, 0.001)
    assert left > 0 and sum(map(len, found.verdicts.values())) <= 1  # the one that had begun
