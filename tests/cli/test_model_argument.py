"""``--model``: folders, names on a hub that answers or does not, and models that are not what they should be."""

from __future__ import annotations

import json
from pathlib import Path
from unittest.mock import Mock

import pytest

pytest.importorskip("transformers")

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

from fastprefix import cli
from fastprefix.models import Found, find_model, load_model, load_tokenizer
from tests.support.tiny_models import save_tiny

NAME = "nobody/nosuchmodel"


def hub(monkeypatch: pytest.MonkeyPatch, answer: Exception | None, cached: bool) -> list[str]:
    """A hub that answers so; returns the names that it is asked for."""
    asked: list[str] = []

    def model_info(self: HfApi, name: str, timeout: float) -> None:
        assert timeout <= 5
        asked.append(name)
        if answer is not None:
            raise answer

    monkeypatch.setattr(HfApi, "model_info", model_info)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda name, file: "config.json" if cached else None)
    return asked


def failure(kind: type[HfHubHTTPError], words: str) -> HfHubHTTPError:
    return kind(words, response=Mock())


ANSWERS = {
    "no network": (OSError("Name or service not known"), "does not answer (Name or service not known)"),
    "no such model": (failure(RepositoryNotFoundError, "401"), "and the hub shows no model of this name"),
    "an error": (failure(HfHubHTTPError, "503 busy\nRequest ID"), "and the hub says: 503 busy;"),
}


@pytest.mark.parametrize(("answer", "message"), ANSWERS.values(), ids=ANSWERS)
def test_a_hub_that_does_not_help_is_asked_once(
    answer: Exception, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = hub(monkeypatch, answer, cached=False)
    assert cli.main(["explain", "--model", NAME]) == cli.USER_ERROR
    error = capsys.readouterr().err
    assert error.startswith(f"fastprefix explain: --model: got {NAME!r}, which is no folder here") and message in error
    assert error.endswith("expected a model's folder, its name on the Hugging Face hub, or smollm2\n")
    assert error.count("\n") == 1 and asked == [NAME]
    hub(monkeypatch, answer, cached=True)
    assert find_model(NAME) == Found(NAME, NAME, local=True)


def test_a_hub_that_answers_is_read_from(monkeypatch: pytest.MonkeyPatch) -> None:
    for cached in (True, False):
        hub(monkeypatch, None, cached)
        assert find_model(NAME) == Found(NAME, NAME, local=False)


def test_what_is_no_name_is_not_looked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = hub(monkeypatch, None, cached=False)
    (tmp_path / "file").touch()
    for name, message in (
        ("./nowhere", "no folder ./nowhere"),
        ("a/b/c", "no folder a/b/c"),
        (str(tmp_path / "file"), "is a file, expected a model's folder"),
        (str(tmp_path), "has no config.json; expected a model's folder"),
        ("no such name!", "no name that the hub could have"),
    ):
        with pytest.raises(ValueError, match=f"^--model: .*{message}"):
            find_model(name)
    assert not asked


def test_models_that_cannot_be_read(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model")
    found = find_model(str(folder))
    config = json.loads((folder / "config.json").read_text())
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"--model: .*/model: its tokenizer cannot be read: "):
        load_tokenizer(found)
    (folder / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"--model: .*/model: its weights cannot be read: "):
        load_model(found)
    t5 = {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}
    (folder / "config.json").write_text(json.dumps(t5))
    with pytest.raises(ValueError, match="of class T5ForConditionalGeneration, expected a causal language model"):
        load_model(found)
    for bad in ({**config, "model_type": "nothing"}, {}):
        (folder / "config.json").write_text(json.dumps(bad))
        with pytest.raises(ValueError, match=r"--model: .*/model: its configuration cannot be read: "):
            load_model(found)
