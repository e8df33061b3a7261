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

from benches.device_suite.model_correctness import MODELS
from benches.device_suite.plan import DIFFERENTIABLE, OperatorTiming, jobs
from fastprefix.machine.device_errors import DeviceLostError
from fastprefix.machine.files import slug
from fastprefix.machine.text_table import text_table
from fastprefix.measure import Problem
from fastprefix.measure.operator.baselines import FA, FA3, FA4
from fastprefix.measure.report_tables import ResultFile, markdown_table, seconds

ROOT = Path(__file__).parents[2]


def test_tables() -> None:
    assert text_table(("who", "ms", "why"), [("a", 1, "x"), ("bcd", 22, "yy")]).splitlines() == [
        "who  ms  why",
        "---  --  ---",
        "a     1  x",
        "bcd  22  yy",
    ]
    assert markdown_table(("a", "b"), [("x|y", 1)]).splitlines()[2] == "| x\\|y | 1 |"
    assert [seconds(x) for x in (2.5, 0.00123, 4.2e-7, 0.9999)] == ["2.5 s", "1.23 ms", "0.42 us", "1e+03 ms"]
    assert slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"


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
    from benches.device_suite.suite_state import SuiteState

    def process() -> SuiteState:
        return SuiteState(tmp_path, "cpu", 100.0, resume=True)

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
    from benches.device_suite import job_runner
    from benches.device_suite.suite_state import SuiteState

    asked: list[list[str]] = []

    def lose(*_: Any) -> None:
        raise DeviceLostError("the second", "an illegal memory access")

    def execv(path: str, args: list[str]) -> None:
        asked.append(args)
        raise SystemExit(0)

    monkeypatch.setattr(job_runner, "recover", lose)
    monkeypatch.setattr(os, "execv", execv)
    with pytest.raises(SystemExit):
        device.main(["--smoke", "--only", "correctness", "--out", str(tmp_path)])
    assert asked[0][1:4] == ["-m", "benches.device", "--resume"] and "--smoke" in asked[0]
    assert asked[0][-2:] == ["--only", "correctness"]
    key = next(iter(jobs("cpu", True))).key
    suite = SuiteState(tmp_path, "cpu", 100.0, resume=True)
    assert suite.blamed(key) == {"the second": "lost the device: an illegal memory access"}
    monkeypatch.undo()
    cases = [("the first", lambda: None), ("the second", lambda: pytest.fail("tried again"))]
    found = job_runner._judge(jobs("cpu", True)[0], suite, cases)
    assert found["bad"] == 1 and found["cases"]["the first"] == "ok"
    assert found["cases"]["the second"] == "failed: lost the device: an illegal memory access"


def test_an_empty_budget_says_what_it_dropped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from benches import device

    assert device.main(["--smoke", "--budget", "0", "--out", str(tmp_path)]) == 0
    assert "of the least important rows dropped" in capsys.readouterr().out
    report = next(tmp_path.glob("*/results.md")).read_text()
    assert not list(tmp_path.glob("*/verified.json"))
    assert f"dropped for the budget of 0 s: {next(iter(jobs('cpu', True))).key}; " in report


def test_a_part_keeps_the_rows_of_the_others(tmp_path: Path) -> None:
    from benches import device

    assert device.main(["--smoke", "--only", "step", "--out", str(tmp_path)]) == 0
    folder = next(tmp_path.iterdir())
    assert {path.name for path in folder.iterdir()} == {"step.json", "results.md"}
    step = json.loads((folder / "step.json").read_text())["rows"][0]
    assert {"ours", "cat", "frozen"} <= set(step["steps"]) and step["floor_s"] > 0 and step["bad"] == 0
    assert device.main(["--smoke", "--only", "operator", "--budget", "0", "--out", str(tmp_path)]) == 0
    assert json.loads((folder / "step.json").read_text())["rows"] == [step]
    assert "## Training step" in (folder / "results.md").read_text()


def test_a_long_row_names_the_peers_that_it_leaves_out(tmp_path: Path) -> None:
    from benches.device_suite.job_runner import DENSE, NO_MASK, run_job
    from benches.device_suite.suite_state import SuiteState

    suite = SuiteState(tmp_path, "cpu", 100.0, resume=False)
    row = run_job(OperatorTiming(Problem.train(2, 4, 2, 16, 32, 16), "forward", long=True), suite, smoke=True)
    assert row["bad"] == 0 and {"ours", "cat_sdpa", "content_only"} <= set(row["peers"])
    assert {name: row["failures"][name] for name in DENSE} == dict.fromkeys(DENSE, NO_MASK)
    for name, module in (("cat_fa", FA), ("cat_fa3", FA3), ("cat_fa4", FA4)):
        assert row["failures"][name] in (f"{module} is not installed", "needs a CUDA device")


def test_the_plan_has_shared_prompts() -> None:
    """DualKV's Table 1: N responses, and a prompt of P tokens that they share."""
    found = [(x.problem.B, x.problem.P) for x in jobs("cuda", False) if isinstance(x, OperatorTiming) and x.long]
    assert found == [(28, 4096), (28, 16384), (16, 32768), (28, 32768), (16, 65536)]


def test_training_needs_a_backend_with_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    from benches.device_suite import training_rows

    monkeypatch.setattr(training_rows, "backend_reasons", lambda problem, name: [])
    monkeypatch.setattr(training_rows, "chosen_backend", lambda problem, mode: "aten")
    names, untimed = training_rows._ours(Problem.train(2, 4, 2, 16, 32, 256, device="meta"))
    assert "ours:cuda" not in names and untimed["ours:cuda"].startswith("gradients: ")
    assert "ours" in names and "ours:triton" in names


@pytest.mark.slow
def test_the_device_suite_runs_here(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benches.device", "--smoke", "--out", str(tmp_path)]
    parts = ["--only", "correctness", "--only", "operator"]
    done = subprocess.run([*command, *parts], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = next(tmp_path.iterdir())
    names = {path.name for path in folder.iterdir()}
    assert names == {"correctness.json", "operator.json", "results.md", "verified.json"}
    correctness = json.loads((folder / "correctness.json").read_text())["rows"]
    assert {row["backend"] for row in correctness} == set(DIFFERENTIABLE)
    assert {row["what"] for row in correctness} == {"shapes", "arguments", *MODELS}
    assert all("ok" in row["cases"].values() for row in correctness if row["backend"] == "reference")
    operator = json.loads((folder / "operator.json").read_text())
    assert operator["environment"]["torch"] == torch.__version__ and len(operator["rows"]) == 5
    assert all("ours" in row["peers"] and row["floor_s"] > 0 for row in operator["rows"])
    for part in ("## Correctness", "## Forward and backward", "## Decoding", "## Not measured"):
        assert part in (folder / "results.md").read_text()
