"""The model card that ``save`` writes: what it says is true, and a card of somebody else's stays."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import fastprefix
from fastprefix import PrefixConfig, PromptConfig, init
from fastprefix.hf.storage.model_card import is_ours
from fastprefix.hf.storage.validated_files import write_json
from tests.model_zoo.encoder_decoders import ROWS as ENCODER_DECODERS
from tests.model_zoo.trained_heads import model as with_head
from tests.support.saved_adapters import CONFIG, KINDS, OWN, WEIGHTS, numbers, same, saved
from tests.support.tiny_models import tiny_model

pytest.importorskip("transformers")
hub = pytest.importorskip("huggingface_hub")

CARD = "README.md"
IDS = torch.arange(3, 9)[None]
EXPECTED = {
    "direct": ("peft", "prefix-tuning", ["2 attention layers", "tokens: 3", "Parameters: 192"]),
    "projected": ("peft", "prefix-tuning", ["`prefix_encoder.safetensors` holds it", "Parameters: 192"]),
    "frozen": ("peft", "cartridge", ["2 attention layers", "Parameters: 192"]),
    "layers": ("fastprefix", "prefix-tuning", ["1 attention layer ", "Parameters: 96", "PEFT has no format"]),
    "prompt": ("peft", "prompt-tuning", ["# Soft prompt for", "trained embeddings", "Parameters: 96"]),
    "encoded_prompt": ("peft", "p-tuning", ["(P-tuning)", "through an LSTM: `prefix_encoder", "Parameters: 96"]),
}


def card(folder: Path) -> str:
    return (folder / CARD).read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_card_says(kind: str, tmp_path: Path) -> None:
    saved(tmp_path, kind)
    loaded = hub.ModelCard.load(tmp_path / CARD)
    library, tag, texts = EXPECTED[kind]
    assert (loaded.data.library_name, loaded.data.tags) == (library, ["fastprefix", tag])
    assert loaded.data.base_model is None and "a LlamaForCausalLM\n" in loaded.text
    for text in texts:
        assert text in loaded.text
    assert ("PeftModel" in loaded.text) == (library == "peft") and is_ours(card(tmp_path))


@pytest.mark.parametrize("kind", KINDS)
def test_its_examples_work(kind: str, tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "base")
    model = tiny_model()
    fastprefix.attach(model, KINDS[kind]())
    fastprefix.save(model, tmp_path / "adapter")
    blocks = re.findall(r"^```python\n(.*?)^```", card(tmp_path / "adapter"), re.S | re.M)
    assert len(blocks) == (1 if kind == "layers" else 2)
    want = model(IDS).logits
    for block in blocks:
        assert len([line for line in block.splitlines() if line]) <= 5
        names: dict[str, Any] = {}
        there = {"BASE_MODEL": tmp_path / "base", "path/to/this/folder": tmp_path / "adapter"}
        for name, path in there.items():
            assert block.count(f'"{name}"') == 1
            block = block.replace(f'"{name}"', repr(str(path)))
        exec(block, names)
        got = names["model"].eval()(input_ids=IDS).logits[:, -IDS.shape[1] :]
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("somebody/a.model", "somebody/a.model"),
        ("gpt2", "gpt2"),
        ("", None),
        ("/somewhere/secret", None),
        ("here", None),
        ("./x", None),
        ("a: b\n---", None),
        (None, None),
    ],
)
def test_the_base_model(name: Any, base: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name on the Hub alone: a path means nothing elsewhere."""
    monkeypatch.chdir(tmp_path)
    Path("here").mkdir()
    model = tiny_model()
    model.config._name_or_path = name
    fastprefix.attach(model, PrefixConfig(3))
    fastprefix.save(model, "adapter")
    loaded = hub.ModelCard.load(tmp_path / "adapter" / CARD)
    assert loaded.data.base_model == base and loaded.data.library_name == "peft"
    assert f'from_pretrained("{base or "BASE_MODEL"}")' in loaded.text and "secret" not in loaded.content


def test_encoder_decoders_and_heads(tmp_path: Path) -> None:
    model = ENCODER_DECODERS["bart"].build()
    fastprefix.attach(model, PrefixConfig(3))
    fastprefix.save(model, tmp_path / "bart")
    loaded = hub.ModelCard.load(tmp_path / "bart" / CARD)
    assert loaded.data.library_name == "fastprefix" and f"import {type(model).__name__}\n" in loaded.text
    model = with_head()
    fastprefix.attach(model, PrefixConfig(3, init=init.normal(0.5), modules_to_save=["score"]))
    fastprefix.save(model, tmp_path / "head")
    loaded = hub.ModelCard.load(tmp_path / "head" / CARD)
    assert "- Saved with it: `score`, 48 numbers" in loaded.text and loaded.data.library_name == "peft"


def test_a_class_that_a_wrapper_derives_has_its_own_name() -> None:
    from fastprefix.hf.storage.model_card import _class

    model = tiny_model()
    model.__class__ = type("FSDPLlamaForCausalLM", (type(model),), {})
    assert _class(model) == "LlamaForCausalLM" and _class(torch.nn.Linear(1, 1)) is None


def test_the_next_save_replaces_it(tmp_path: Path) -> None:
    saved(tmp_path, "direct")
    first = card(tmp_path)
    saved(tmp_path, "direct", seed=2)
    assert card(tmp_path) == first  # other numbers, and nothing else
    saved(tmp_path, "prompt")
    assert "# Soft prompt" in card(tmp_path) and is_ours(card(tmp_path))
    # As git hands it out on Windows.
    (tmp_path / CARD).write_bytes(card(tmp_path).replace("\n", "\r\n").encode())
    saved(tmp_path, "direct")
    assert card(tmp_path) == first


@pytest.mark.parametrize("edit", ["appended", "inside", "front matter", "mark gone", "other", "empty", "no text"])
def test_somebody_elses_card_stays(edit: str, tmp_path: Path) -> None:
    saved(tmp_path, "direct")
    text = card(tmp_path)
    changed = {
        "appended": text + "Trained on colours.\n",
        "inside": text.replace("## Use", "## How to use"),
        "front matter": text.replace("tags:", "license: mit\ntags:"),
        "mark gone": text.rpartition("<!--")[0],
        "other": "# Mine\n",
        "empty": "",
    }
    content = changed[edit].encode() if edit in changed else b"\xff\xfe\x00"
    (tmp_path / CARD).write_bytes(content)
    after = saved(tmp_path, "prompt")
    assert (tmp_path / CARD).read_bytes() == content
    assert same(numbers(fastprefix.load(tiny_model(), tmp_path)), after)


@pytest.mark.parametrize("what", ["folder", "dangling link"])
def test_what_is_no_file_stays(what: str, tmp_path: Path) -> None:
    if what == "folder":
        (tmp_path / CARD).mkdir()
    else:
        (tmp_path / CARD).symlink_to("nowhere")
    after = saved(tmp_path, "prompt")
    assert (tmp_path / CARD).is_dir() == (what == "folder") and (tmp_path / CARD).is_symlink() == (what != "folder")
    assert same(numbers(fastprefix.load(tiny_model(), tmp_path)), after)


def test_peft_takes_the_card_over(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    saved(tmp_path, "direct")
    theirs = peft.PeftModel.from_pretrained(tiny_model(), str(tmp_path))
    theirs.save_pretrained(tmp_path / "theirs")
    written = hub.ModelCard.load(tmp_path / "theirs" / CARD)
    fastprefix.save(attached(), tmp_path / "theirs")
    assert hub.ModelCard.load(tmp_path / "theirs" / CARD).content == written.content
    theirs.save_pretrained(tmp_path)
    by_both = card(tmp_path)
    assert "PEFT" in by_both and not is_ours(by_both)
    fastprefix.save(attached(), tmp_path)
    assert card(tmp_path) == by_both
    fastprefix.load(tiny_model(), tmp_path)


def attached() -> Any:
    model = tiny_model()
    fastprefix.attach(model, PromptConfig(4))
    return model


@pytest.mark.parametrize("wanted", [WEIGHTS, OWN, CARD, CONFIG])
def test_the_card_is_part_of_the_save(wanted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed while the files are moved: the next load puts the card of the new adapter in its place, too."""
    saved(tmp_path, "direct")
    place = os.replace

    def replace(source: Any, target: Any) -> None:
        place(source, target)
        if Path(target).name == wanted:
            raise KeyboardInterrupt

    model = attached()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", replace)
        fastprefix.save(model, tmp_path)
    fastprefix.load(tiny_model(), tmp_path)
    assert "tokens: 4" in card(tmp_path) and is_ours(card(tmp_path))


def test_an_error_before_the_commit_leaves_the_old_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path, "direct")
    before = card(tmp_path)

    def write(data: Any, path: str) -> None:
        if path.endswith(CONFIG):
            assert (Path(path).parent / CARD).read_text() != before  # the new one waits there
            raise OSError("disk full")
        write_json(data, path)

    monkeypatch.setattr("fastprefix.hf.storage.save_load.write_json", write)
    with pytest.raises(OSError, match="disk full"):
        fastprefix.save(attached(), tmp_path)
    assert card(tmp_path) == before
