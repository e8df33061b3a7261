"""``fastprefix generate``: what it says is what the model says, and what is wrong is named."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

import fastprefix
from fastprefix import cli
from tests.support.cli_runs import CHAT_TEMPLATE, make_folder
from tests.support.tiny_models import tiny_model, tiny_tokenizer

PROMPT = "sky"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model in ``model`` and an adapter in ``adapter``."""
    make_folder(tmp_path, chat_template=CHAT_TEMPLATE)
    save_adapter(tmp_path / "adapter")
    return tmp_path


def save_adapter(path: Path, base: str | None = None) -> None:
    model = tiny_model()
    torch.manual_seed(0)
    fastprefix.attach(model, fastprefix.PrefixConfig(5, init=fastprefix.init.normal(4.0)))
    fastprefix.save(model, path)
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": base}))


def said(folder: Path | None, prompt: str, new_tokens: int = 6) -> str:
    """What transformers' ``generate`` says, with the adapter of a folder or without."""
    model, tokenizer = tiny_model(), tiny_tokenizer()
    if folder is not None:
        fastprefix.load(model, folder / "adapter")
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False)
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))


def generate(folder: Path, *options: str, model: bool = True) -> int:
    named = ["--model", str(folder / "model")] if model else []
    return cli.main(["generate", str(folder / "adapter"), *named, "--max-new-tokens", "6", *options])


def test_with_and_without(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options, want in (([], said(folder, PROMPT)), (["--without"], said(None, PROMPT))):
        assert generate(folder, "--prompt", PROMPT, *options) == 0
        assert capsys.readouterr() == (want + "\n", "")
    assert said(folder, PROMPT) == "blue colour" != said(None, PROMPT)


def test_the_prompt_may_come_from_standard_input(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(PROMPT + "\n"))
    assert generate(folder) == 0
    assert capsys.readouterr().out == said(folder, PROMPT) + "\n"
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    assert generate(folder) == cli.USER_ERROR
    assert "--prompt: got no text" in capsys.readouterr().err


def test_a_chat_goes_through_the_template(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # The tiny tokenizer puts a bos in front of what lacks one here.
    system = " colour is <eos> sky <bos>"
    for options, before in (([], ""), (["--system", "is"], system)):
        assert generate(folder, "--prompt", "grass", "--chat", *options) == 0
        want = said(folder, f"{before} the grass <eos> sky <bos> colour")
        assert capsys.readouterr().out == want + "\n"


def test_the_model_that_the_adapter_names(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(folder, "--prompt", PROMPT, model=False) == cli.USER_ERROR
    assert "--model: got none, and " in capsys.readouterr().err
    save_adapter(folder / "adapter", str(folder / "model"))
    assert generate(folder, "--prompt", PROMPT, model=False) == 0
    assert capsys.readouterr().out == said(folder, PROMPT) + "\n"
    save_adapter(folder / "adapter", str(folder / "gone"))
    assert generate(folder, "--prompt", PROMPT, model=False) == cli.USER_ERROR
    assert f"--model: no folder {folder}/gone ({folder}/gone is what " in capsys.readouterr().err


def test_pefts_adapters(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    peft.get_peft_model(tiny_model(), config).save_pretrained(folder / "theirs")
    (folder / "adapter").rename(folder / "ours")
    (folder / "theirs").rename(folder / "adapter")
    assert generate(folder, "--prompt", PROMPT) == 0
    assert capsys.readouterr().out == said(folder, PROMPT) + "\n"


def test_what_is_wrong_is_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    other = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(**other, num_hidden_layers=3)).save_pretrained(folder / "other")
    tiny_tokenizer().save_pretrained(folder / "other")
    adapter, model = str(folder / "adapter"), str(folder / "model")
    (folder / "empty").mkdir()
    capsys.readouterr()
    for words, message in (
        ([str(folder / "nowhere"), "--model", model], f"no folder {folder}/nowhere, expected an adapter's"),
        ([str(folder / "empty"), "--model", model], f"no file {folder}/empty/adapter_config.json"),
        ([model, "--model", model], "no file"),
        ([adapter, "--model", adapter], "has no config.json, but an adapter's adapter_config.json; expected a model's"),
        (
            [adapter, "--model", str(folder / "other")],
            "adapter_model.safetensors: prompt_embeddings: got shape [5, 64]",
        ),
        ([adapter, "--model", model, "--system", "x"], "--system: expected --chat with it"),
    ):
        assert cli.main(["generate", *words, "--prompt", "a"]) == cli.USER_ERROR
        error = capsys.readouterr().err
        assert error.startswith("fastprefix generate: ") and message in error and error.count("\n") == 1
