"""What is remembered: whole, damaged, foreign and unwritable files, and several processes at once."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastprefix import dispatch, prefix_attention
from fastprefix.machine import files
from fastprefix.verification import lookup, store
from fastprefix.verification.cells import ANY, Cell
from fastprefix.verification.identity import identity
from fastprefix.verification.table import Bucket, Table, Verdict
from tests.support.operator_calls import arguments, make_call
from tests.verification.conftest import CPU

CELL = Cell("forward", "fp32", 16, 16, 3, ANY, ("causal",))
BUCKET = Bucket("forward", "fp32", 16, "plain", 2, 6, 2, 32, 32, 8)
RIGHT = Verdict("right", 0.5, "o: error 1.00e-07, eager's 1.00e-07", "2026-11-27")


def table(result: str = "right", **others: Verdict) -> Table:
    """A table of this machine in which aten's folded route has a result."""
    verdict = replace(RIGHT, result=result)  # type: ignore[arg-type]
    found = {f"aten:{name}": other for name, other in others.items()}
    return Table(identity(CPU), {CELL: {"aten:folded": verdict, **found}}, {BUCKET: {"aten:folded": 1e-3}})


def chosen() -> str | None:
    """The route of aten that ``auto`` takes; None where it guesses, or takes the reference."""
    return dispatch.choose(arguments(make_call(S=32, P=8)), "auto").route


def test_what_is_written_is_read(cache: Path) -> None:
    file = store.add(CPU, table())
    assert file is not None and file.parent == cache / "verified" and file == store.path(CPU)
    store.forget()
    assert store.table(CPU).verdicts == table().verdicts and store.table(CPU).times == table().times
    assert chosen() == "folded"


def test_a_second_writer_adds(cache: Path) -> None:
    store.add(CPU, table())
    store.forget()
    decode = CELL._replace(direction="decode")
    store.add(CPU, Table(identity(CPU), {decode: {"aten:folded": RIGHT}}))
    store.forget()
    assert set(store.table(CPU).verdicts) == {CELL, decode}


@pytest.mark.parametrize("field", ["device", "driver", "torch", "triton", "sources", "threads"])
def test_a_foreign_file_is_as_none(field: str) -> None:
    foreign = Table({**identity(CPU), field: "another"}, table().verdicts)
    files.write_atomically(store.path(CPU), foreign.to_json())
    assert not store.table(CPU).verdicts


def test_another_thread_count_is_another_file() -> None:
    before, threads = store.path(CPU), torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert store.path(CPU) != before
    finally:
        torch.set_num_threads(threads)


def test_the_sources_are_those_that_compute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = identity(CPU)["sources"]
    tiles = tmp_path / "tiles.json"
    tiles.write_text("{}")
    monkeypatch.setenv("FASTPREFIX_TILES", str(tiles))
    assert identity(CPU)["sources"] != before


def _damaged(text: str, rng: random.Random) -> str:
    """A text of which a piece is lost, doubled, changed or zeroed."""
    at, length = rng.randrange(len(text)), rng.randrange(1, 40)
    match rng.randrange(6):
        case 0:
            return text[:at]
        case 1:
            return text[:at] + text[at + length :]
        case 2:
            return text[:at] + text[at : at + length] + text[at:]
        case 3:
            return text[:at] + "\0" * length + text[at + length :]
        case 4:
            return text[:at] + "".join(rng.choice('0123456789"{}[],:.nulltrue') for _ in range(length)) + text[at:]
    changed = rng.choice("0123456789abcxyz")
    return text[:at] + changed + text[at + 1 :]


def test_two_hundred_damaged_files() -> None:
    whole = table("right", packed=replace(RIGHT, result="wrong"))
    text, rng = whole.to_json(), random.Random(0)
    none = 0
    for _ in range(200):
        damaged = _damaged(text, rng)
        files.write_atomically(store.path(CPU), damaged)
        store.forget()
        found = store.table(CPU)
        # A piece of white space may be lost: then it is the same table. No other is ever read.
        assert found.verdicts in ({}, whole.verdicts) and found.times in ({}, whole.times)
        none += not found.verdicts
    assert none > 180
    o = prefix_attention(**make_call(S=32, P=8).leaves)
    assert o.isfinite().all()
    file = store.path(CPU)
    assert file is not None
    file.unlink()
    store.forget()
    store.add(CPU, table())
    store.forget()
    assert store.table(CPU).verdicts == table().verdicts


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe\x00",
        b"[]",
        b"{}",
        b"null",
        b'{"format": 0, "checksum": ""}',
        b"[" * 10_000,
    ],
)
def test_what_is_no_table(content: bytes) -> None:
    store.path(CPU).parent.mkdir(parents=True)
    store.path(CPU).write_bytes(content)
    assert not store.table(CPU).verdicts and chosen() is None


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("verdicts", str(CELL), "aten:folded", "result"), "fine"),
        (("verdicts", str(CELL), "aten:folded", "worst"), "small"),
        (("verdicts", str(CELL), "magic:folded"), {"result": "right"}),
        (("verdicts", "forward fp32 16 causal"), {}),
        (("times", str(BUCKET), "aten:folded"), -1.0),
        (("times", str(BUCKET), "aten:folded"), "fast"),
        (("times", "forward fp32"), {}),
        (("identity",), 3),
    ],
)
def test_a_file_of_another_hand_is_checked(path: tuple[str, ...], value: object) -> None:
    """With a right checksum, and still no table."""
    from fastprefix.verification.table import _checksum

    content = json.loads(table().to_json())
    del content["checksum"]
    place = content
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    text = json.dumps({**content, "checksum": _checksum(content)})
    with pytest.raises(ValueError, match="no table of verdicts"):
        Table.from_json(text)


def test_a_home_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("FASTPREFIX_CACHE", str(blocked / "cache"))
    with store.alone(CPU, patience=1.0) as waited:
        assert not waited
        assert store.add(CPU, table()) is None
    assert chosen() == "folded"
    assert store.add(CPU, table()) is None
    told = capsys.readouterr().err
    assert told.count("cannot be written") == 1 and "the verdicts last for this process" in told


class TestPolicy:
    """``$FASTPREFIX_VERIFY``."""

    def test_off_takes_the_vendor_unproved(self, monkeypatch: pytest.MonkeyPatch) -> None:
        store.add(CPU, table("wrong"))
        assert lookup.order(arguments(make_call(S=32, P=8)), "forward") == (lookup.REFERENCE,)
        monkeypatch.setenv("FASTPREFIX_VERIFY", "off")
        store.forget()
        assert dispatch.choose(arguments(make_call(S=32, P=8)), "auto") == lookup.VENDOR

    def test_a_file(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        file = tmp_path / "verified.json"
        store.add(CPU, table(), file)
        assert not store.path(CPU).exists()
        store.forget()
        assert chosen() is None
        monkeypatch.setenv("FASTPREFIX_VERIFY", str(file))
        store.forget()
        assert chosen() == "folded"

    def test_a_file_that_is_not_there(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("FASTPREFIX_VERIFY", "on")
        store.forget()
        with pytest.raises(ValueError, match="FASTPREFIX_VERIFY: got 'on', expected 'off', 'first-use' or a file"):
            prefix_attention(**make_call().leaves)

    def test_a_file_of_another_device(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
    ) -> None:
        file = tmp_path / "verified.json"
        file.write_text(Table({**identity(CPU), "device": "NVIDIA A100"}, table().verdicts).to_json())
        monkeypatch.setenv("FASTPREFIX_VERIFY", str(file))
        store.forget()
        prefix_attention(**make_call(S=32, P=8).leaves)
        prefix_attention(**make_call(S=31, P=8).leaves)
        assert capsys.readouterr().err.count("nothing in it holds for") == 1 and chosen() is None


HOLDER = """
import os, sys, time
from fastprefix.verification import store
import torch
torch.set_num_threads(int(sys.argv[1]))
with store.alone(torch.device("cpu"), patience=60.0):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.mark.slow
def test_a_lock_ends_with_its_holder() -> None:
    line = [sys.executable, "-c", HOLDER, str(torch.get_num_threads())]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with store.alone(CPU, patience=0.2) as waited:
            assert waited
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        start = time.monotonic()
        with store.alone(CPU, patience=60.0):
            assert time.monotonic() - start < 30
