"""``fastprefix.verify`` and its command: what it takes, what it says, what it leaves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fastprefix
from fastprefix import cli
from fastprefix.verification import plan, run, store
from fastprefix.verification.cells import ANY, FEATURES, Cell
from fastprefix.verification.identity import identity
from fastprefix.verification.table import Bucket, Table, Verdict
from tests.verification.conftest import CPU
from tests.verification.test_verdicts import Faults

CELLS = [Cell("forward", "fp32", 16, 16, 2, ANY, ("causal",)), Cell("decode", "fp32", 16, 16, 2, ANY, ("causal",))]
TIMED = [Bucket("forward", "fp32", 16, "plain", 2, 4, 2, 32, 32, 8)]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan of seconds."""
    monkeypatch.setattr(plan, "cells", lambda device_type: CELLS)
    monkeypatch.setattr(plan, "buckets", lambda device_type: TIMED)


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_verify(cache: Path) -> None:
    lines: list[str] = []
    found = fastprefix.verify("cpu", progress=lines.append)
    assert found.wrong == [] and found.left_out == 0 and found.file == store.path(CPU)
    assert set(found.table.verdicts) == set(CELLS) and set(found.table.times) == set(TIMED)
    assert lines[0].startswith("1 of 9 checks") and lines[-1].startswith("1 of 1 timings")
    told = str(found)
    for text in ("aten:folded", "worst error", "forward fp32 D16 plain B2 H4 H_kv2", "reference", str(found.file)):
        assert text in told, told
    store.forget()
    assert set(store.table(CPU).verdicts) == set(CELLS)


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_the_command_tells_what_is_wrong(
    cache: Path, faults: Faults, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    faults({"aten:folded": "sign"})
    out = tmp_path / "shipped" / "verified.json"
    monkeypatch.setenv("FASTPREFIX_VERIFY", str(out))  # as it will be; it need not be there yet
    assert cli.main(["verify", "--device", "cpu", "--out", str(out)]) == 1
    told = capsys.readouterr()
    assert "aten:folded wrong on forward fp32 16x16 G2 Pany causal: o: error" in told.out and not told.err
    assert set(Table.from_json(out.read_text()).verdicts) == set(CELLS)
    assert not (cache / "verified").exists() or not list((cache / "verified").glob("*.json"))
    store.forget()
    assert store.table(CPU).verdicts


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"device": "gpu"}, "device: got 'gpu', expected 'cpu', 'cuda:1' or so"),
        ({"device": "cuda:7"}, "device: got 'cuda:7', expected a device that torch finds here, as 'cpu'"),
        ({"device": "meta"}, "device: got 'meta', expected a device that torch finds here"),
        ({"device": 1.5}, "device: got 1.5, expected"),
        ({"budget": 0}, "budget: got 0, expected a positive number of seconds"),
        ({"budget": float("nan")}, "budget: got nan"),
    ],
)
def test_wrong_arguments(given: dict[str, object], message: str) -> None:
    if torch.cuda.is_available() and "as 'cpu'" in message:
        pytest.skip("there is a GPU")
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        fastprefix.verify(**given)  # type: ignore[arg-type]


def test_an_output_that_cannot_be_written_is_told_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "examine", lambda *args: pytest.fail("it worked first"))
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        fastprefix.verify("cpu", out=tmp_path / "file" / "verified.json")
    assert cli.main(["verify", "--device", "cpu", "--out", str(tmp_path)]) == 2
    assert "is a folder, expected a file" in capsys.readouterr().err


def test_no_child_can_start(faults: Faults, capsys: pytest.CaptureFixture[str]) -> None:
    faults({"aten:folded": "no start"})
    assert cli.main(["verify", "--device", "cpu"]) == 2
    assert "no child process could start: exit status 1: no device is left" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_a_failure_is_taken_back() -> None:
    """Of a bucket that is none of the plan's, as a model's own are."""
    own = TIMED[0]._replace(P=10, H=6)
    failed = Verdict("hung", None, "while timed", "2026-11-27")
    store.add(CPU, Table(identity(CPU), failures={own: {"aten:folded": failed}}))
    assert store.table(CPU).failure("aten:folded", CELLS[0]) == failed
    fastprefix.verify("cpu")
    store.forget()
    assert store.table(CPU).failure("aten:folded", CELLS[0]) is None
    assert "aten:folded" in store.table(CPU).times[own]


def test_the_plan_covers_what_it_promises() -> None:
    for kind, dtypes in (("cpu", {"fp32", "bf16", "fp16", "fp64"}), ("cuda", {"bf16", "fp16", "fp32"})):
        cells, buckets = plan.cells(kind), plan.buckets(kind)
        assert len(set(cells)) == len(cells) or kind == "cpu"
        assert {cell.dtype for cell in cells} == dtypes and {cell.G for cell in cells} == {1, 4}
        assert {(64, 64), (128, 128), (256, 256), (192, 128)} <= {(cell.D, cell.D_v) for cell in cells}
        named = {name for cell in cells for name in cell.features}
        assert named == set(FEATURES) - {"bias-grad", "scale", "dropout"}  # only the reference takes these
        assert {x.mode for x in buckets} == {"forward", "backward", "lowest", "decode"}
        assert {x.variant for x in buckets} == {"plain", "masked", "bank"} and len(set(buckets)) == len(buckets)
