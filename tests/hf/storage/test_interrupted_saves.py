"""A save that is killed, or finds the disk full, at any of its steps: there is the adapter of before or the new one."""

from __future__ import annotations

import errno
import itertools
import json
import os
import resource
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

import fastprefix
from fastprefix.hf.storage import atomic_folder as folders
from fastprefix.hf.storage.atomic_folder import COMMIT, STAGING
from tests.support.fault_injection import at_step
from tests.support.kill_during_save import CHANGES, attached, seen_by_peft
from tests.support.saved_adapters import CONFIG, ENCODER, OWN, WEIGHTS, numbers, same, saved
from tests.support.tiny_models import tiny_model

pytest.importorskip("transformers")

FULL = [
    pytest.param("steps", len(CHANGES), 200, id="steps-all", marks=pytest.mark.exhaustive),
    pytest.param("twice", 2, 200, id="twice", marks=pytest.mark.exhaustive),
    pytest.param("random", 300, 300, id="random-300", marks=pytest.mark.exhaustive),
]


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "count", "kills"), [("steps", 2, 50), ("random", 50, 50), *FULL])
def test_killed_saves(mode: str, count: int, kills: int, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.support.kill_during_save", mode, str(tmp_path / "adapter"), str(count)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout.splitlines()[-1])["kills"] >= kills


@pytest.fixture(autouse=True)
def _no_flushing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody cuts the power here, and flushing is most of a save's time."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def no_space() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.slow
@pytest.mark.parametrize(("old", "new"), [("direct", "projected"), ("projected", "direct")])
def test_a_full_disk(old: str, new: str, tmp_path: Path) -> None:
    """At whatever step: the error arrives, the old adapter stays or the new one is whole, and the next save works."""
    before = saved(tmp_path, old)
    model, after = attached(new, 2)
    seen = []
    for step in itertools.count(2):  # the first makes the folder, which is there
        saved(tmp_path, old)
        with at_step(step, no_space) as count:
            try:
                fastprefix.save(model, tmp_path)
            except OSError as error:
                assert error.errno == errno.ENOSPC
            else:
                assert count[0] < step, f"the error of step {step} was swallowed"
        found = numbers(fastprefix.load(tiny_model(), tmp_path))
        seen.append(same(found, after))
        assert seen[-1] or same(found, before)
        assert seen[-1] or not (tmp_path / STAGING).exists()
        if count[0] < step:
            break
    assert seen == sorted(seen) and not seen[0]


def test_the_system_says_that_there_is_no_room(tmp_path: Path) -> None:
    before = saved(tmp_path, "projected")
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    model, _ = attached("projected", 2)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"\.safetensors") as error:
            fastprefix.save(model, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert error.value.errno == errno.EFBIG
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files
    assert same(numbers(fastprefix.load(tiny_model(), tmp_path)), before)


def interrupted(folder: Path, wanted: str) -> dict[str, Any]:
    """Leave the folder as a save does that was killed when the file ``wanted`` was in its place; the saved numbers."""
    model, after = attached("projected", 2)
    place = os.replace

    def replace(source: Any, target: Any) -> None:
        place(source, target)
        if Path(target).name == wanted:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", replace)
        fastprefix.save(model, folder)
    return after


def test_a_folder_that_cannot_be_written_is_read_as_it_was_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for wanted in (ENCODER, WEIGHTS, OWN, CONFIG):
        saved(tmp_path, "direct")
        after = interrupted(tmp_path, wanted)
        files = {str(path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        with monkeypatch.context() as patch:
            patch.setattr(folders, "_finish", lambda folder: no_space())
            assert same(numbers(fastprefix.load(tiny_model(), tmp_path)), after)
        assert {str(path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == files
        assert same(numbers(fastprefix.load(tiny_model(), tmp_path)), after) and not (tmp_path / STAGING).exists()


@pytest.mark.parametrize("text", ["", "[]", '{"files": 3}', '{"files": ["../x"], "without": []}', "[" * 100_000])
def test_a_commit_that_is_none_is_rubbish(text: str, tmp_path: Path) -> None:
    before = saved(tmp_path, "direct")
    (tmp_path.parent / "x").write_text("somebody's")
    (tmp_path / STAGING).mkdir()
    (tmp_path / STAGING / COMMIT).write_text(text)
    (tmp_path / STAGING / CONFIG).write_text("half")
    assert same(numbers(fastprefix.load(tiny_model(), tmp_path)), before)
    saved(tmp_path, "direct")
    assert {path.name for path in tmp_path.iterdir()} == {CONFIG, WEIGHTS, OWN, "README.md"}
    assert (tmp_path.parent / "x").read_text() == "somebody's"


def test_what_was_saved_by_peft_since_is_newer(tmp_path: Path) -> None:
    import peft

    for wanted in (ENCODER, CONFIG):
        saved(tmp_path, "direct")
        interrupted(tmp_path, wanted)
        os.utime(tmp_path / STAGING / COMMIT, (1, 1))  # a while ago
        config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
        theirs = peft.get_peft_model(tiny_model(), config)
        theirs.save_pretrained(tmp_path)
        files = {name: (tmp_path / name).read_bytes() for name in (CONFIG, WEIGHTS)}
        with pytest.raises(ValueError, match=rf"{WEIGHTS}: .*= \[3, 64\]"):  # as beside any other file of ours
            fastprefix.load(tiny_model(), tmp_path)
        (tmp_path / OWN).unlink()
        assert fastprefix.load(tiny_model(), tmp_path).num_virtual_tokens == 4
        assert files == {name: (tmp_path / name).read_bytes() for name in (CONFIG, WEIGHTS)}


def test_the_clock_may_be_set_back(tmp_path: Path) -> None:
    saved(tmp_path, "projected")
    for path in tmp_path.iterdir():
        os.utime(path, (2**32, 2**32))
    want = saved(tmp_path, "direct")
    assert same(numbers(fastprefix.load(tiny_model(), tmp_path)), want) and not (tmp_path / ENCODER).exists()


def test_what_lies_in_the_way_is_not_followed(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "mine").write_text("precious")
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / STAGING).symlink_to(elsewhere)
    saved(folder, "direct")
    assert (elsewhere / "mine").read_text() == "precious" and not (folder / STAGING).is_symlink()
    (folder / OWN).unlink()
    (folder / OWN).mkdir()
    with pytest.raises(ValueError, match=f"{OWN}: got a folder, expected a file, or nothing, to be replaced"):
        saved(folder, "direct")


def test_readers_and_savers_at_once(tmp_path: Path) -> None:
    """Two threads save into one folder, two load from it: everybody has whole adapters."""
    ring = [attached(kind, seed) for seed, kind in enumerate(("direct", "projected", "prompt"))]
    fastprefix.save(ring[0][0], tmp_path)
    done, errors, loads = threading.Event(), [], [0, 0]

    def guarded(run: Any) -> None:
        try:
            run()
        except BaseException as error:
            errors.append(error)
            done.set()

    def saving() -> None:
        for turn in range(24):
            fastprefix.save(ring[turn % 3][0], tmp_path)

    def loading(place: int) -> None:
        while not done.is_set():
            found = numbers(fastprefix.load(tiny_model(), tmp_path))
            assert any(same(found, want) for _, want in ring)
            loads[place] += 1

    savers = [threading.Thread(target=guarded, args=(saving,)) for _ in range(2)]
    loaders = [threading.Thread(target=guarded, args=(lambda i=i: loading(i),)) for i in range(2)]
    for thread in (*savers, *loaders):
        thread.start()
    for thread in savers:
        thread.join()
    done.set()
    for thread in loaders:
        thread.join()
    assert not errors, errors
    assert min(loads) >= 1 and seen_by_peft(tmp_path) is not None and not (tmp_path / STAGING).exists()
