"""What happens when a call or a model comes first: on a stand-in for a GPU, and on the processor."""

from __future__ import annotations

import functools
import io
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fastprefix import explain, prefix_attention
from fastprefix.machine import device
from fastprefix.verification import first_use, run, store
from fastprefix.verification.cells import Cell, cell_of, signature
from fastprefix.verification.child import Child
from fastprefix.verification.identity import identity
from fastprefix.verification.table import Table, Verdict
from tests.support.operator_calls import arguments, make_call
from tests.verification.conftest import CPU, backend_of

Faults = Callable[[dict[str, str]], None]


class TestCallsOnAGpu:
    """The first call of a kind verifies it, where it may."""

    def test_the_first_call_and_no_other(
        self, gpu: str, examined: list[list[Cell]], capsys: pytest.CaptureFixture[str]
    ) -> None:
        call = make_call(S=32)
        for _ in range(3):
            prefix_attention(**call.leaves).sum().backward()
        assert [cell.direction for cell in examined[0]] == ["forward", "backward"] and len(examined) == 1
        told = capsys.readouterr().err
        assert told.count("\n") == 1 and gpu in told and told.rstrip().endswith(" s"), told
        assert backend_of(arguments(call)) == backend_of(arguments(call), "lowest") == "aten:folded"
        store.forget()  # as another process: it reads the file
        assert backend_of(arguments(call)) == "aten:folded" and len(examined) == 1
        assert f"folded, proved on {gpu}, 2026-11-27, worst error 0.5 of the rule, not timed" in explain(**call.leaves)

    def test_a_longer_call_of_the_kind_is_known(self, gpu: str, examined: list[list[Cell]]) -> None:
        for S in (32, 33, 200):
            prefix_attention(**make_call(S=S).leaves)
        assert len(examined) == 1
        prefix_attention(**make_call(S=1, T=9).leaves)
        prefix_attention(**make_call(S=32).leaves, window=3)
        assert [cell.direction for cell in examined[1]] == ["decode"] and "window" in examined[2][0].features

    def test_explain_verifies_nothing(self, gpu: str, examined: list[list[Cell]]) -> None:
        told = explain(**make_call(S=32).leaves)
        assert not examined
        assert "reference  chosen by auto" in told
        assert (
            f"aten       can, by name only: not proved on {gpu}: `fastprefix verify` does it, or the first call" in told
        )

    def test_one_asked_for_by_name_runs_unproved(self, gpu: str, examined: list[list[Cell]]) -> None:
        prefix_attention(**make_call(S=32).leaves, backend="aten")
        assert not examined

    def test_what_is_known_is_not_done_again(
        self, gpu: str, examined: list[list[Cell]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pairs: list[dict[Cell, list[str]]] = []
        examine = first_use.examine

        def noted(place: torch.device, found: dict[Cell, list[str]], *rest: Any) -> tuple[Table, int]:
            pairs.append(found)
            return examine(place, found, *rest)

        monkeypatch.setattr(first_use, "examine", noted)
        cell = cell_of(arguments(make_call(S=32)), "forward")
        hung = Verdict("hung", None, "", "2026-11-27")
        store.add(CPU, Table(identity(CPU), {cell: {"aten:concatenated": hung}}))
        prefix_attention(**make_call(S=32).leaves)
        assert pairs[0][cell] == ["aten:folded", "aten:packed", "triton:fused"]
        assert store.table(CPU).verdict(cell, "aten:concatenated") == hung

    def test_whatever_goes_wrong_is_not_the_callers(
        self, gpu: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(first_use, "examine", lambda *args: 1 / 0)
        for _ in range(2):
            assert prefix_attention(**make_call(S=32).leaves).isfinite().all()
        assert capsys.readouterr().err.count("impossible: division by zero") == 1

    def test_neither_a_home_nor_stderr(
        self, gpu: str, examined: list[list[Cell]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def home() -> Path:
            raise RuntimeError("Could not determine home directory.")

        for name in ("FASTPREFIX_CACHE", "XDG_CACHE_HOME"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(Path, "home", home)
        monkeypatch.setattr(sys, "stderr", None)
        prefix_attention(**make_call(S=32).leaves)
        closed = io.StringIO()
        closed.close()
        monkeypatch.setattr(sys, "stderr", closed)
        store.say("nobody reads this")
        assert len(examined) == 1 and backend_of(arguments(make_call(S=32))) == "aten:folded"

    def test_a_longer_cache_is_another_decision(self) -> None:
        keys = [signature(arguments(make_call(S=1, T=T)), "forward") for T in (40, 50, 300)]
        assert keys[0] == keys[1] != keys[2]

    def test_switched_off(self, gpu: str, examined: list[list[Cell]], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("FASTPREFIX_VERIFY", "off")
        prefix_attention(**make_call(S=32).leaves)
        assert not examined and backend_of(arguments(make_call(S=32))) == "aten:None"

    def test_nobody_is_asked_what_nobody_takes(self, gpu: str, examined: list[list[Cell]]) -> None:
        bias = torch.zeros(1, 6, 32, 32, requires_grad=True)
        prefix_attention(**make_call(S=32).leaves, bias=bias).sum().backward()
        prefix_attention(**make_call(S=32).leaves, dropout_p=0.1)
        assert not examined

    def test_not_while_a_graph_is_captured(
        self,
        gpu: str,
        examined: list[list[Cell]],
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        call = make_call(S=32)
        with monkeypatch.context() as capturing:
            capturing.setattr(device, "is_capturing", lambda place: True)
            for _ in range(2):
                prefix_attention(**call.leaves)
            assert not examined and backend_of(arguments(call)) == "reference:None"
        told = capsys.readouterr().err
        assert told.count("\n") == 1 and "Run `fastprefix verify`" in told
        prefix_attention(**call.leaves)
        assert len(examined) == 1 and backend_of(arguments(call)) == "aten:folded"

    def test_not_in_a_backward(self, gpu: str, examined: list[list[Cell]], monkeypatch: pytest.MonkeyPatch) -> None:
        call = make_call(S=32)
        o = prefix_attention(**call.leaves, backend="reference")
        seen: list[int] = []

        def recompute(*leaves: torch.Tensor) -> torch.Tensor:
            if torch._C._current_graph_task_id() != -1:
                seen.append(len(examined))
                prefix_attention(*leaves, softcap=3.0)
            return prefix_attention(*leaves, softcap=3.0, backend="reference")

        checkpoint(recompute, *call.leaves.values(), use_reentrant=False, preserve_rng_state=False).sum().backward()
        o.sum().backward()
        assert seen == [0] and not examined  # it stops as soon as what was saved is there again

    def test_not_while_a_forward_is_traced(self, gpu: str, examined: list[list[Cell]]) -> None:
        leaves = [x.detach() for x in make_call(S=32).leaves.values()]
        torch.jit.trace(prefix_attention, leaves, check_trace=False)
        assert not examined

    def test_compiled(self, gpu: str, examined: list[list[Cell]]) -> None:
        compiled = torch.compile(prefix_attention, backend="eager", fullgraph=True)
        call = make_call(S=32)
        torch.testing.assert_close(compiled(**call.leaves), prefix_attention(**call.leaves, backend="reference"))
        assert len(examined) == 1  # when it ran, not when it was compiled

    def test_no_child_can_start(
        self, gpu: str, faults: Faults, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        faults({"aten:folded": "no start"})
        for S in (32, 33):
            call = make_call(S=S)
            assert prefix_attention(**call.leaves).isfinite().all()
            assert backend_of(arguments(call)) == "reference:None"
        told = capsys.readouterr().err
        assert told.count("impossible: no child process could start") == 1 and "no device is left" in told

    @pytest.mark.slow
    def test_for_real(self, gpu: str, faults: Faults, monkeypatch: pytest.MonkeyPatch) -> None:
        """Children that really run, one of whose routes crashes: the caller gets a right answer from another."""
        faults({"aten:folded": "segfault"})
        monkeypatch.setitem(run.PATIENCE, "cuda", 20.0)
        call = make_call(S=32, P=4, D=16)
        got = prefix_attention(**call.leaves)
        torch.testing.assert_close(got, prefix_attention(**call.leaves, backend="reference"))
        assert backend_of(arguments(call)) in ("aten:concatenated", "aten:packed")
        assert store.path(CPU).name.startswith("nvidia-stand-in-") and store.path(CPU).exists()


@pytest.mark.slow
def test_a_child_takes_no_module_from_the_current_folder(tmp_path: Path) -> None:
    """Which is not on the path of a program that lies elsewhere."""
    for name in ("statistics", "json", "torch"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('taken from the current folder')")
    program = tmp_path / "program" / "main.py"
    program.parent.mkdir()
    program.write_text(
        "import torch\n"
        "from fastprefix.verification import run\n"
        "from fastprefix.verification.cells import ANY, Cell\n"
        "cell = Cell('decode', 'fp32', 16, 16, 2, ANY, ('causal',))\n"
        "found, _ = run.examine(torch.device('cpu'), {cell: ['aten:folded']}, [], 600.0)\n"
        "print(found.verdicts[cell]['aten:folded'].result)\n"
    )
    root = str(Path(__file__).parent.parent.parent)
    done = subprocess.run(
        [sys.executable, str(program)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "right\n", done.stderr


@pytest.mark.slow
def test_a_child_that_does_not_die_holds_nobody_up() -> None:
    """Another process keeps its output open, as a process that a driver holds would."""
    code = (
        "import subprocess, sys, time\n"
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(30)'], start_new_session=True)\n"
        "print('{\"ready\": true}', flush=True)\n"
        "time.sleep(60)\n"
    )
    child = Child([sys.executable, "-c", code], dict(os.environ), patience=0.5)
    start = time.monotonic()
    assert child.ask({})[1] == "hung"
    assert time.monotonic() - start < 20 and not child.alive


TWO = """
import sys, torch
from fastprefix import dispatch, prefix_attention
from fastprefix.machine import device
from tests.support.operator_calls import arguments, make_call
torch.set_num_threads(1)
for name, value in {"kind": "cuda", "name": "NVIDIA Stand-in", "capability": "sm_90", "driver": "1"}.items():
    setattr(device, name, lambda place, value=value: value)
device.is_capturing, device.free_memory = (lambda place: False), (lambda place: 2**34)
print("ready", flush=True)
sys.stdin.readline()
prefix_attention(**make_call(S=32, P=4).leaves)
chosen = dispatch.choose(arguments(make_call(S=32, P=4)), "auto")
print(dispatch.name_of(chosen.module), flush=True)
"""


@pytest.mark.slow
def test_two_processes_write_one_table(cache: Path) -> None:
    line = [sys.executable, "-c", TWO]
    start = functools.partial(
        subprocess.Popen, line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    environment = {**os.environ, "FASTPREFIX_NATIVE": "0"}  # as the fixture of all these tests
    both = [start(cwd=Path(__file__).parent.parent.parent, env=environment) for _ in range(2)]
    for process in both:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for process in both:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    told = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], told
    assert [out for out, _ in told] == ["aten\n"] * 2
    # One has done the work and said so; the other has waited, and read what was found.
    assert sorted(error.count("checking which backends are right") for _, error in told) == [0, 1], told
    (file,) = (cache / "verified").glob("*.json")
    assert Table.from_json(file.read_text()).verdicts
