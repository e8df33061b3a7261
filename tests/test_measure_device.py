"""The device suite: it runs on tiny shapes anywhere, and neither a fault, a kill nor the budget loses what is done."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fastprefix.measure.run import DeviceLostError
from fastprefix.measure.tables import ResultFile

ROOT = Path(__file__).parent.parent


def test_a_result_file_is_whole_at_every_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.json"
    file = ResultFile(path, {"device": "x"})
    file.add({"key": "a", "t": 1})
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        file.add({"key": "b", "t": 2})
    monkeypatch.undo()
    assert [row["key"] for row in json.loads(path.read_text())["rows"]] == ["a"]
    assert os.listdir(tmp_path) == ["rows.json"]
    again = ResultFile(path, {"device": "x"}, resume=True)
    again.add({"key": "a", "t": 3})
    assert again.rows == [{"key": "a", "t": 3}]
    path.write_text("{")
    with pytest.raises(ValueError, match="no result file"):
        ResultFile(path, {}, resume=True)


def test_what_ended_two_processes_is_blamed(tmp_path: Path) -> None:
    from benches.suite import Suite

    def process() -> Suite:
        return Suite(tmp_path, "cpu", 100.0, resume=True)

    first = process()
    first.add("operator", {"key": "done"})
    first.begin("row", "peer")
    second = process()
    assert second.done("operator", "done") and second.blamed("row") == {} and second.spent >= first.spent - 1
    second.begin("row", "peer")
    assert list(process().blamed("row")) == ["peer"]
    process().finish()
    assert process().blamed("row") == {}


def test_a_lost_device_goes_on_in_a_new_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benches import device
    from benches.suite import Suite

    asked: list[list[str]] = []

    def lose(*_: Any) -> Any:
        raise DeviceLostError("", "an illegal memory access")

    def execv(path: str, args: list[str]) -> None:
        asked.append(args)
        raise SystemExit(0)

    monkeypatch.setattr(device, "do", lose)
    monkeypatch.setattr(os, "execv", execv)
    with pytest.raises(SystemExit):
        device.main(["--smoke", "--out", str(tmp_path)])
    assert asked[0][1:4] == ["-m", "benches.device", "--resume"] and "--smoke" in asked[0]
    key = next(iter(device.jobs("cpu", True))).key
    assert Suite(tmp_path, "cpu", 100.0, resume=True).blamed(key) == {"": "lost the device: an illegal memory access"}


def test_an_empty_budget_says_what_it_dropped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from benches import device

    assert device.main(["--smoke", "--budget", "0", "--out", str(tmp_path)]) == 0
    assert "of the least important rows dropped" in capsys.readouterr().out
    report = next(tmp_path.glob("*/results.md")).read_text()
    assert f"dropped for the budget of 0 s: {next(iter(device.jobs('cpu', True))).key}; " in report


def test_the_device_suite_runs_here(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benches.device", "--smoke", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = next(tmp_path.iterdir())
    assert {path.name for path in folder.iterdir()} == {"correctness.json", "operator.json", "step.json", "results.md"}
    operator = json.loads((folder / "operator.json").read_text())
    assert operator["environment"]["torch"] == torch.__version__ and len(operator["rows"]) == 4
    assert all("ours" in row["peers"] and row["floor_s"] > 0 for row in operator["rows"])
    for part in ("## Correctness", "## Forward and backward", "## Decoding", "## Training step", "## Not measured"):
        assert part in (folder / "results.md").read_text()
