"""``fastprefix train``: where it starts, what it reads, what it leaves behind, and what it says before it loads."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import fastprefix
from fastprefix import cli
from tests.support.cli_runs import CHAT_TEMPLATE, CHATS, TEXTS, make_folder, train, write_lines
from tests.support.tiny_models import ROWS, tiny_model

KINDS = {"pairs": ROWS, "chat": CHATS, "text": TEXTS}
TEXT = "snow is white"  # four tokens with its bos


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path)


def saved(folder: Path) -> Any:
    """The saved adapter's numbers: of a soft prompt its embeddings, of a prefix the first layer's keys."""
    prefix = fastprefix.load(tiny_model(), folder)
    return next(p for p in prefix.parameters()).detach()


def key_of(ids: list[int]) -> torch.Tensor:
    """The tiny model's first keys of some tokens."""
    return next(
        fastprefix.attach(
            tiny_model(), fastprefix.PrefixConfig(len(ids), init=fastprefix.init.token_ids(ids))
        ).parameters()
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "ids", "told", "warning"),
    [
        ([], 16, "the first tokens of --data, '<bos> the colour of grass is green <eos> <bos> the", ""),
        (["--num-virtual-tokens", "3"], 3, "the first tokens of --data, '<bos> the colour'", ""),
        (["--init-text", TEXT], 4, f"keys and values of '<bos> {TEXT}'", ""),
        (
            ["--init-text", TEXT, "--num-virtual-tokens", "3"],
            3,
            "keys and values of '<bos> snow is'",
            "--init-text has 4 tokens, --num-virtual-tokens is 3: the last 1 are cut off",
        ),
        (
            ["--init-text", TEXT, "--num-virtual-tokens", "6"],
            6,
            f"keys and values of '<bos> {TEXT} <bos> snow'",
            "--init-text has 4 tokens, --num-virtual-tokens is 6: the text is repeated",
        ),
        (["--init", "random", "--num-virtual-tokens", "3"], 3, "a prefix of 3 tokens starts at random", ""),
    ],
    ids=["data", "data-cut", "text", "text-cut", "text-repeated", "random"],
)
def test_where_it_starts(
    options: list[str], ids: int, told: str, warning: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(folder, "--max-steps", "1", "--lr", "1e-9", *options) == 0
    out, err = capsys.readouterr()
    assert f"a prefix of {ids} tokens starts at " in out and told in out
    assert err == (f"fastprefix train: warning: {warning}\n" if warning else "")
    key = saved(folder / "out")
    assert key.shape == (2, ids, 8)
    if "random" not in options:
        # The first three tokens of the data and of the text.
        first = [1, 4, 5] if "--init-text" not in options else [1, *map(word_id, ("snow", "is"))]
        torch.testing.assert_close(key[:, :3], key_of(first), rtol=0, atol=1e-6)


def word_id(word: str) -> int:
    from tests.support.tiny_models import tiny_tokenizer

    return int(tiny_tokenizer().convert_tokens_to_ids(word))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "method"), [("pairs", "prefix"), ("pairs", "prompt"), ("chat", "prefix"), ("text", "prompt")]
)
def test_every_kind_of_data_and_the_command_that_uses_the_adapter(
    kind: str, method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_folder(tmp_path, KINDS[kind], CHAT_TEMPLATE)
    assert train(folder, "--epochs", "20", "--lr", "0.1", "--method", method) == 0
    out = capsys.readouterr().out
    losses = [float(x) for x in re.findall(r"^step +\d+ of 60: loss ([\d.]+), .* left$", out, re.MULTILINE)]
    assert len(losses) >= 10 and losses[-1] < losses[0] - 1
    sample = dict(re.findall(r"^  (prompt|wanted|before|after): '(.*)'$", out, re.MULTILINE))
    assert list(sample) == ["prompt", "wanted", "before", "after"] and sample["before"] != sample["after"]
    wanted = {"pairs": "green", "chat": "green", "text": "grass is green"}
    assert sample["wanted"] == wanted[kind]
    assert (folder / "out" / "loss.png").stat().st_size > 5_000 and "loss.png" in out

    line = out.splitlines()[-1]
    assert line.startswith("  fastprefix generate ") and ("--chat" in line) == (kind == "chat")
    words = shlex.split(line)[1:]
    assert cli.main([*words, "--max-new-tokens", "32"]) == 0
    said = capsys.readouterr().out.rstrip("\n")
    if kind != "text":  # whose sample goes on from tokens, the command from words
        assert said == sample["after"]
    assert cli.main([*words, "--max-new-tokens", "32", "--without"]) == 0
    assert capsys.readouterr().out.rstrip("\n") != said


def test_a_soft_prompt_resumes_exactly(folder: Path) -> None:
    options = ("--method", "prompt", "--num-virtual-tokens", "4", "--epochs", "2", "--save-steps", "3")
    assert train(folder, *options, output="whole") == 0
    (folder / "part").mkdir()
    (folder / "whole" / "checkpoint-3").rename(folder / "part" / "checkpoint-3")
    assert train(folder, *options, "--resume", output="part") == 0
    assert torch.equal(saved(folder / "part"), saved(folder / "whole"))
    assert saved(folder / "part").shape == (4, 32)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["prefix", "prompt"])
def test_the_start_is_kept_beside_the_end(method: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--method", method, "--num-virtual-tokens", "4", "--save-start", str(folder / "start")]
    assert train(folder, *options, "--max-steps", "2", "--save-steps", "1") == 0
    start, end = saved(folder / "start"), saved(folder / "out")
    assert start.shape == end.shape and not torch.equal(start, end)
    if method == "prefix":
        torch.testing.assert_close(start[:, :3], key_of([1, 4, 5]), rtol=0, atol=1e-6)
    page = ["inspect", str(folder / "out"), "--model", str(folder / "model"), "--start", str(folder / "start")]
    assert cli.main([*page, "--output", str(folder / "page.html")]) == 0

    # Whoever goes on keeps the first run's start: what the prefix is attached with now may be another.
    more = [*options, "--resume", "--init", "random", "--max-steps"]
    assert train(folder, *more, "3") == 0 and torch.equal(saved(folder / "start"), start)
    (folder / "start" / "adapter_config.json").unlink()
    capsys.readouterr()
    assert train(folder, *more, "4") == cli.USER_ERROR
    assert "--save-start: no adapter_config.json in " in capsys.readouterr().err


def test_another_method_cannot_resume(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(folder, "--max-steps", "4", "--save-steps", "2", "--num-virtual-tokens", "4") == 0
    capsys.readouterr()
    for options in (["--method", "prompt", "--num-virtual-tokens", "4"], ["--num-virtual-tokens", "5"]):
        assert train(folder, "--max-steps", "6", "--resume", *options) == cli.USER_ERROR
        assert "fastprefix_config.json: " in capsys.readouterr().err


def test_without_matplotlib_there_is_no_plot(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastprefix.train.plot.find_spec", lambda name: None)
    assert train(folder, "--max-steps", "1") == 0
    assert "no loss.png: matplotlib is not installed" in capsys.readouterr().out
    assert not (folder / "out" / "loss.png").exists()


WRONG: dict[str, tuple[list[str], str]] = {
    "output is a file": (["--output", "data.jsonl"], "--output: data.jsonl is a file, expected a folder"),
    "output below a file": (["--output", "data.jsonl/a/b"], "--output: data.jsonl is a file, expected a folder"),
    "start is a file": (["--save-start", "data.jsonl"], "--save-start: data.jsonl is a file, expected a folder"),
    "start is output": (
        ["--output", "new", "--save-start", "./new"],
        "--save-start: got ./new, expected another folder than --output",
    ),
    "no data": (["--data", "nowhere.jsonl"], "--data: no file nowhere.jsonl"),
    "data is a folder": (["--data", "model"], "--data: model is a folder, expected a file"),
    "no held-out data": (["--eval-data", "nowhere.jsonl"], "--eval-data: no file nowhere.jsonl"),
    "bad data": (["--data", "bad.jsonl"], "bad.jsonl, line 2: not JSON"),
    "bad held-out data": (["--eval-data", "bad.jsonl"], "bad.jsonl, line 2: not JSON"),
    "another kind held out": (
        ["--eval-data", "texts.jsonl"],
        "--eval-data: got 6 texts, expected lines of the same kind as --data: 6 prompt/completion pairs",
    ),
    "two starts": (["--init", "data", "--init-text", "a"], "--init and --init-text: expected one of the two"),
    "an MLP of none": (["--method", "prompt", "--prefix-projection"], "--prefix-projection: expected --method prefix"),
}


@pytest.mark.parametrize(("options", "message"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_found_before_anything_loads(
    options: list[str],
    message: str,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def load(*args: Any) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr("fastprefix.models.find_model", load)
    monkeypatch.chdir(folder)
    write_lines(folder / "texts.jsonl", TEXTS)
    write_lines(folder / "bad.jsonl", ROWS[:1]).open("a").write("\n{")
    assert train(folder, *options) == cli.USER_ERROR
    error = capsys.readouterr().err
    assert error.startswith(f"fastprefix train: {message}") and error.count("\n") == 1


def test_a_folder_that_cannot_be_written_is_found_too(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastprefix.cli.options.os.access", lambda path, mode: False)  # root may write anywhere
    assert train(folder, output="a/b") == cli.USER_ERROR
    assert f"--output: {folder} cannot be written to" in capsys.readouterr().err


def test_messages_need_a_chat_template(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(make_folder(tmp_path, CHATS)) == cli.USER_ERROR
    assert "data.jsonl, line 1: the tokenizer has no chat template" in capsys.readouterr().err
