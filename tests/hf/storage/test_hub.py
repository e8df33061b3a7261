"""Adapters from the Hub's cache, without a network: the layout of the cache is made by hand."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import fastprefix
from tests.support.saved_adapters import CONFIG, ENCODER, KINDS, WEIGHTS, numbers, same, saved
from tests.support.tiny_models import tiny_model

pytest.importorskip("transformers")

MAIN, TAGGED = "a" * 40, "b" * 40
REPOSITORY = "somebody/an-adapter"


def cached(cache: Path, source: Path, revision: str = "main", commit: str = MAIN, name: str = REPOSITORY) -> Path:
    """Put a folder's files into a cache of the Hub as a revision of a repository; the snapshot's folder."""
    folder = cache / f"models--{name.replace('/', '--')}"
    snapshot, blobs, ref = folder / "snapshots" / commit, folder / "blobs", folder / "refs" / revision
    for made in (snapshot, blobs, ref.parent):
        made.mkdir(parents=True, exist_ok=True)
    ref.write_text(commit)
    for path in source.iterdir():
        blob = blobs / f"{commit}-{path.name}"
        shutil.copy(path, blob)
        (snapshot / path.name).symlink_to(os.path.relpath(blob, snapshot))
    return snapshot


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the Hub, offline, in a working folder of its own. The constants are read at import."""

    def connect(*args: Any) -> None:
        raise AssertionError("a connection was tried")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(socket.socket, "connect", connect)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "hub"


@pytest.mark.parametrize("kind", KINDS)
def test_from_the_cache(kind: str, cache: Path, tmp_path: Path) -> None:
    want = saved(tmp_path / "saved", kind)
    cached(cache, tmp_path / "saved")
    model = tiny_model()
    prefix = fastprefix.load(model, REPOSITORY)
    assert same(numbers(prefix), want)
    assert model._fastprefix.selection.active == "default"


def test_pefts_from_the_cache(cache: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    theirs = peft.get_peft_model(tiny_model(), config).eval()
    theirs.save_pretrained(tmp_path / "saved")
    cached(cache, tmp_path / "saved")
    ids = torch.arange(3, 9)[None]
    model = tiny_model()
    fastprefix.load(model, REPOSITORY, "theirs")
    torch.testing.assert_close(model(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-4)


def test_revisions(cache: Path, tmp_path: Path) -> None:
    want = {}
    for seed, (revision, commit) in enumerate((("main", MAIN), ("v1", TAGGED))):
        want[revision] = want[commit] = saved(tmp_path / revision, "direct", seed)
        cached(cache, tmp_path / revision, revision, commit)
    assert not same(want["main"], want["v1"])
    for revision in ("main", "v1", TAGGED):
        assert same(numbers(fastprefix.load(tiny_model(), REPOSITORY, revision=revision)), want[revision])
    assert same(numbers(fastprefix.load(tiny_model(), REPOSITORY)), want["main"])
    model = tiny_model()
    with pytest.raises(ValueError, match=r"dir: got 'somebody/an-adapter' at revision 'v2' \(LocalEntryNotFoundError"):
        fastprefix.load(model, REPOSITORY, revision="v2")
    assert not hasattr(model, "_fastprefix")


def test_what_lies_here_comes_first(cache: Path, tmp_path: Path) -> None:
    saved(tmp_path / "saved", "direct", 1)
    cached(cache, tmp_path / "saved")
    here = saved(Path(REPOSITORY), "direct", 2)
    assert same(numbers(fastprefix.load(tiny_model(), REPOSITORY)), here)
    with pytest.raises(ValueError, match=r"revision: got 'main' with 'somebody/an-adapter', expected None with a fold"):
        fastprefix.load(tiny_model(), REPOSITORY, revision="main")
    (Path(REPOSITORY) / CONFIG).unlink()
    with pytest.raises(ValueError, match=r"dir: got no file somebody/an-adapter/adapter_config.json"):
        fastprefix.load(tiny_model(), REPOSITORY)


def test_neither_a_folder_nor_a_repository(cache: Path) -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match=r"dir: got 'no/where' \(.*\), expected a folder, or the name of a repository"):
        fastprefix.load(model, "no/where")
    with pytest.raises(ValueError, match=r"dirs: got 'no/where' \(.*in its cache: there is neither"):
        fastprefix.register(model, {"a": "no/where"})
    # These are no names of repositories: nothing is looked up.
    for given in ("nowhere", "./no/where", "no/where/at-all", "no--where/x", "/no/where", Path("no/where")):
        with pytest.raises(ValueError, match=r"dir: got no file .*adapter_config.json, expected a folder written by"):
            fastprefix.load(model, given)
        with pytest.raises(ValueError, match="revision: got 'main' with"):
            fastprefix.load(model, given, revision="main")
    assert not hasattr(model, "_fastprefix")


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, ENCODER])
def test_a_repository_with_a_file_missing(name: str, cache: Path, tmp_path: Path) -> None:
    saved(tmp_path / "saved", "projected")
    (tmp_path / "saved" / name).unlink()
    cached(cache, tmp_path / "saved")
    with pytest.raises(ValueError, match=rf"dir: got no file .*snapshots.*{name}"):
        fastprefix.load(tiny_model(), REPOSITORY)


def test_nothing_is_written_into_the_cache(cache: Path, tmp_path: Path) -> None:
    saved(tmp_path / "saved", "projected")
    cached(cache, tmp_path / "saved")
    before = {path: path.lstat().st_mtime_ns for path in cache.rglob("*")}
    fastprefix.load(tiny_model(), REPOSITORY)
    assert {path: path.lstat().st_mtime_ns for path in cache.rglob("*")} == before


def test_registered(cache: Path, tmp_path: Path) -> None:
    ids, want = torch.arange(3, 9)[None], {}
    for seed, name in enumerate(("somebody/one", "somebody/two")):
        saved(tmp_path / name, "direct", seed)
        cached(cache, tmp_path / name, commit=f"{seed}" * 40, name=name)
        fastprefix.load(model := tiny_model(), name)
        want[name] = model(ids).logits
    model = tiny_model()
    fastprefix.register(model, {"one": "somebody/one", "two": "somebody/two", "three": tmp_path / "somebody/one"})
    with torch.no_grad(), fastprefix.prefix_batch(model, ["one", "two", "three"]):
        got = model(ids.expand(3, -1)).logits
    for row, name in enumerate(("one", "two", "one")):
        torch.testing.assert_close(got[row], want[f"somebody/{name}"][0], rtol=1e-5, atol=1e-5)


def test_only_an_adapters_files_are_asked_for(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hub itself cannot be asked here: what would be is seen."""
    want = saved(tmp_path / "saved", "projected")
    asked: list[tuple[str, Any, list[str]]] = []

    def download(repo_id: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((repo_id, revision, allow_patterns))
        return str(tmp_path / "saved")

    monkeypatch.setattr("fastprefix.hf.storage.hub.snapshot_download", download)
    assert same(numbers(fastprefix.load(tiny_model(), REPOSITORY, revision="v1")), want)
    assert asked == [(REPOSITORY, "v1", [CONFIG, WEIGHTS, "fastprefix_config.json", ENCODER])]


@pytest.mark.slow
def test_the_environment_says_where_the_cache_is(tmp_path: Path) -> None:
    saved(tmp_path / "saved", "direct")
    cached(tmp_path / "home" / "hub", tmp_path / "saved")
    code = (
        "import fastprefix; from tests.support.tiny_models import tiny_model;"
        f"print(fastprefix.load(tiny_model(), {REPOSITORY!r}).num_virtual_tokens)"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "FASTPREFIX_VERIFY": "off"}
    environment = {name: value for name, value in environment.items() if name != "HF_HUB_CACHE"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == "3", done.stderr
