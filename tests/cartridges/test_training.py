"""Training a cartridge of a tiny model: what is kept, resumed, measured, saved and refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import fastprefix
from fastprefix import CartridgeConfig, cli
from fastprefix.cartridges import Report, trainer
from fastprefix.cartridges.batches import Example, collate, predictions
from tests.support.cli_runs import CHAT_TEMPLATE, write_lines
from tests.support.tiny_models import ROWS, save_tiny, tiny_model, tiny_tokenizer

TEXT = "grass is green snow is white coal is black sky is blue blood is red sun is yellow"
OTHER = "blue is the colour of snow and white of coal the sun is black blood is green"
CONFIG = CartridgeConfig(
    tokens=6, num_conversations=10, question_tokens=4, answer_tokens=6, top_k=8, batch_size=3, max_steps=6, eval_steps=2
)
FILES = ("adapter_config.json", "adapter_model.safetensors", "fastprefix_config.json")


def train(folder: Path, texts: Any = TEXT, model: Any = None, config: CartridgeConfig = CONFIG, **more: Any) -> Report:
    model = tiny_model() if model is None else model
    return fastprefix.train_cartridge(model, tiny_tokenizer(), texts, folder, config, say=lambda line: None, **more)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Report]:
    """A folder with a cartridge, the model that it is attached to, and the report."""
    folder, model = tmp_path_factory.mktemp("trained") / "out", tiny_model()
    return folder, model, train(folder, model=model)


def test_the_cartridge_is_saved_and_attached_and_its_first_token_is_the_start_s(
    trained: tuple[Path, Any, Report],
) -> None:
    folder, model, _ = trained
    ids = torch.tensor([[1, 4, 5, 6]])
    other = tiny_model()
    prefix = fastprefix.load(other, folder)
    assert torch.equal(other(ids).logits, model(ids).logits)
    start = fastprefix.PrefixConfig(init=_start_of(folder), num_frozen_tokens=1)
    before = fastprefix.attach(tiny_model(), start)
    for (k, v), (k0, v0) in zip(prefix.key_values(), before.key_values(), strict=True):
        assert torch.equal(k[:, :1], k0[:, :1]) and torch.equal(v[:, :1], v0[:, :1])
        assert not torch.equal(k[:, 1:], k0[:, 1:]) and not torch.equal(v[:, 1:], v0[:, 1:])


def _start_of(folder: Path) -> fastprefix.init.Init:
    from fastprefix.cartridges.batches import examples_of
    from fastprefix.cartridges.preparation import reference
    from fastprefix.data import read_data

    examples = examples_of(read_data(folder / "conversations_0.jsonl").encode(tiny_tokenizer()))
    rows = reference(examples[max(1, round(CONFIG.heldout * len(examples))) :])
    return fastprefix.attention_matching(tiny_model(), TEXT, 6, tokenizer=tiny_tokenizer(), queries=rows)


def test_peft_reads_it_as_a_cartridge(trained: tuple[Path, Any, Report]) -> None:
    peft = pytest.importorskip("peft")
    folder, model, _ = trained
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["peft_type"], config["num_frozen_tokens"], config["num_virtual_tokens"]) == ("CARTRIDGE", 1, 6)
    theirs = peft.PeftModel.from_pretrained(tiny_model(), str(folder)).eval()
    ids = torch.tensor([[1, 4, 5, 6]])
    torch.testing.assert_close(theirs(ids).logits, model(ids).logits, rtol=0, atol=1e-5)


def test_the_report_measures_each_and_says_it_on_one_page(trained: tuple[Path, Any, Report]) -> None:
    folder, _, report = trained
    assert list(report.losses) == [
        "no text",
        "the text's first tokens",
        "start: Attention Matching",
        "whole text",
        "trained cartridge",
    ]
    assert report.losses["whole text"].divergence == 0.0 and report.steps == 6
    assert report.closed("no text") in (0.0, None) and report.closed("whole text") in (1.0, None)
    assert Report.read(folder / "report.json") == report
    assert [entry["step"] for entry in report.curve if "eval_loss" in entry] == [2, 4, 6]
    best = min(entry["eval_divergence"] for entry in report.curve if "eval_divergence" in entry)
    assert report.losses["trained cartridge"].divergence == pytest.approx(best)
    length = report.text_tokens[0]
    assert report.bytes == [(length * 2 * 2 * 2 * 8 * 4, 6 * 2 * 2 * 2 * 8 * 4)]  # layers, K and V, heads, D, fp32
    page = (folder / "report.html").read_text()
    assert "prefers-color-scheme: dark" in page and "<svg" in page
    assert "http" not in page and "src=" not in page and "<link" not in page
    assert f"{report.losses['no text'].loss:.4f}" in page and "trained cartridge" in report.text()


@pytest.mark.parametrize(("texts", "at"), [(TEXT, 4), (TEXT, 1), ([TEXT, OTHER], 5)], ids=["one", "early", "two"])
def test_an_interrupted_run_ends_with_the_same_bits(
    texts: Any, at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(whole, texts)
    steps, compute = [], trainer.CartridgeTrainer.compute_loss

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        steps.append(1)
        if len(steps) == at:
            raise KeyboardInterrupt
        return compute(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(trainer.CartridgeTrainer, "compute_loss", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(cut, texts)
    report = train(cut, texts, resume=True)
    names = [""] if texts == TEXT else ["document_0", "document_1"]
    for name in names:
        for file in FILES:
            assert (cut / name / file).read_bytes() == (whole / name / file).read_bytes(), (name, file)
    assert report.losses == Report.read(whole / "report.json").losses


def test_several_documents_are_composed_and_measured_together(tmp_path: Path) -> None:
    model = tiny_model()
    report = train(tmp_path, [TEXT, OTHER], model=model, config=replace(CONFIG, distractors=1.0))
    assert "trained, with all others" in report.losses and len(report.text_tokens) == 2
    ids, names = torch.tensor([[1, 4, 5, 6]]), ("document_1", "document_0")
    with fastprefix.prefix_batch(model, [names]):
        together = model(ids).logits
    loaded = tiny_model()
    prefixes = [fastprefix.load(loaded, tmp_path / name, name) for name in names]
    fastprefix.attach(loaded, fastprefix.PrefixConfig(init=fastprefix.init.concat(*prefixes)), "both")
    torch.testing.assert_close(loaded(ids).logits, together, rtol=0, atol=1e-5)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_distractors_stand_before_and_behind_as_often_as_asked(share: float) -> None:
    found = object.__new__(trainer.CartridgeTrainer)
    found.names, found.distractors = ["a", "b", "c"], share
    torch.manual_seed(0)
    rows = found._with_distractors([1] * 3000)
    assert rows is not None
    several = [row for row in rows if isinstance(row, tuple)]
    assert len(several) / 3000 == pytest.approx(share, abs=0.03)
    assert all(row == "b" or ("b" in row and len(set(row)) == 2) for row in rows)
    if share:
        assert set(several) == {("a", "b"), ("b", "a"), ("c", "b"), ("b", "c")}


def test_packed_rows_predict_what_padded_ones_predict() -> None:
    model = tiny_model()
    fastprefix.attach(model, fastprefix.PrefixConfig(3, init=fastprefix.init.token_ids([1, 4, 5])))
    rows = [[1, 4, 5, 6, 7], [1, 9, 8], [1, 12, 11, 10]]
    examples = [Example(torch.tensor(r), torch.arange(1, len(r)), torch.tensor([*r[2:], 2])) for r in rows]
    packed, padded = (predictions(model, collate(examples, x)) for x in (True, False))
    alone = torch.cat([model(torch.tensor([r])).logits[0, 1:] for r in rows])
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-5)
    torch.testing.assert_close(padded, alone, rtol=0, atol=1e-5)


def test_given_conversations_are_trained_on(tmp_path: Path) -> None:
    lines = write_lines(tmp_path / "given.jsonl", ROWS)
    report = train(tmp_path / "out", conversations=lines)
    assert report.conversations == [5] and report.heldout == 1
    assert not (tmp_path / "out" / "conversations_0.jsonl").exists()


def test_a_deadline_stops_with_what_there_is(tmp_path: Path) -> None:
    report = train(tmp_path, minutes=1e-6)
    assert report.steps == 1 and (tmp_path / "adapter_model.safetensors").is_file()
    with pytest.raises(ValueError, match=r"output: got .* with an earlier run, expected resume"):
        train(tmp_path)
    assert train(tmp_path, resume=True).steps == 6


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "tokens": ({"config": replace(CONFIG, tokens=50)}, "tokens: got 50, expected 1 to 19"),
    "no documents": ({"texts": []}, "texts: got none"),
    "conversations": ({"texts": [TEXT, OTHER], "conversations": "x"}, "conversations: got a file for 2 documents"),
    "nothing to resume": ({"resume": True}, "resume: got nothing of an earlier run"),
    "top_k": ({"config": replace(CONFIG, top_k=99)}, "top_k: got 99, expected 1 to 32"),
}


@pytest.mark.parametrize(("given", "message"), WRONG.values(), ids=WRONG)
def test_wrong_calls_are_named(given: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        train(tmp_path / "out", **given)


def test_a_model_with_prefixes_is_refused(tmp_path: Path) -> None:
    model = tiny_model()
    fastprefix.attach(model, fastprefix.PrefixConfig(2))
    with pytest.raises(ValueError, match="model: got one with prefixes attached"):
        train(tmp_path, model=model)


FIELDS = {
    "tokens": 0,
    "start": "random",
    "num_frozen_tokens": 512,
    "heldout": 1.0,
    "distractors": 1.5,
    "lr": 0.0,
    "epochs": float("inf"),
    "max_steps": 0,
    "patience": 0,
    "seed": -1,
}


@pytest.mark.parametrize(("field", "value"), FIELDS.items(), ids=FIELDS)
def test_fields_out_of_range_are_named(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{field}: got"):
        CartridgeConfig(**{field: value})


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_tiny(tmp_path / "model")
    (model / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    (tmp_path / "a.md").write_text(TEXT)
    files = ["--model", str(model), "--text", str(tmp_path / "a.md"), "--output", str(tmp_path / "out")]
    sizes = [
        "--tokens",
        "6",
        "--num-conversations",
        "8",
        "--answer-tokens",
        "4",
        "--top-k",
        "8",
        "--max-steps",
        "2",
        "--eval-steps",
        "1",
    ]
    assert cli.main(["cartridge", *files, *sizes, "--start", "first-tokens"]) == 0
    out = capsys.readouterr().out
    assert "trained cartridge" in out and "fastprefix generate" in out
    assert json.loads((tmp_path / "out" / "conversations_0.jsonl").read_text().splitlines()[0])["messages"]
    assert cli.main(["generate", str(tmp_path / "out"), "--model", str(model), "--chat", "--prompt", "snow"]) == 0
    capsys.readouterr()
    assert cli.main(["cartridge", *files, *sizes]) == cli.USER_ERROR
    assert "output: got" in capsys.readouterr().err
    assert cli.main(["cartridge", *files[:2], "--text", "nowhere", "--output", "x"]) == cli.USER_ERROR
    assert capsys.readouterr().err == "fastprefix cartridge: --text: no file nowhere\n"
