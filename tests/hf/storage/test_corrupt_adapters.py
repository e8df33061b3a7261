"""What cannot be loaded is refused by path and field, and the model is then exactly what it was."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import fastprefix
from fastprefix.hf.trainer import restore
from tests.model_zoo.architectures import ROWS
from tests.support.corrupt_adapters import EMBEDDINGS, WRONG
from tests.support.saved_adapters import CONFIG, KINDS, OWN, WEIGHTS, edit_tensors, numbers, same, saved, state
from tests.support.tiny_models import tiny_model

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def bare() -> Any:
    return tiny_model()


@pytest.mark.parametrize("what", WRONG)
def test_refused(what: str, bare: Any, tmp_path: Path) -> None:
    kind, change, message = WRONG[what]
    saved(tmp_path, kind)
    before = state(bare)
    change(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        fastprefix.load(bare, tmp_path)
    assert str(tmp_path) in str(error.value) and re.search(r": got .+, expected .+", str(error.value), re.DOTALL)
    assert len(str(error.value)) < 1000
    assert state(bare) == before


def test_an_unreadable_file(bare: Any, tmp_path: Path) -> None:
    saved(tmp_path, "direct")
    (tmp_path / OWN).chmod(0)
    if os.access(tmp_path / OWN, os.R_OK):
        pytest.skip("this user reads everything")
    with pytest.raises(ValueError, match=f"{OWN}: got no access"):
        fastprefix.load(bare, tmp_path)


def test_beside_another_prefix_the_other_stays(tmp_path: Path) -> None:
    model = tiny_model()
    fastprefix.attach(model, KINDS["direct"](), "mine")
    ids = torch.arange(3, 9)[None]
    before, want = state(model), model(ids).logits
    saved(tmp_path, "direct")
    edit_tensors(tmp_path / WEIGHTS, lambda t: t[EMBEDDINGS].zero_())
    with pytest.raises(ValueError, match="replaced since"):
        fastprefix.load(model, tmp_path)
    assert state(model) == before and model._fastprefix.selection.active == "mine"
    assert torch.equal(model(ids).logits, want)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("llama_mha", r"got shape \[3, 64\], expected .* = \[3, 128\]"),
        ("gpt2", r"= \[3, 128\]"),
        ("bert", r"= \[3, 128\]"),
    ],
)
def test_another_model(row: str, message: str, tmp_path: Path) -> None:
    saved(tmp_path, "direct")
    model = ROWS[row].build()
    before = state(model)
    with pytest.raises(ValueError, match=message):
        fastprefix.load(model, tmp_path)
    assert state(model) == before


def test_as_many_numbers_in_other_heads(tmp_path: Path) -> None:
    """Four heads of four are as many numbers as two of eight."""
    saved(tmp_path, "direct")
    config = tiny_model().config
    config.num_attention_heads, config.num_key_value_heads, config.head_dim = 8, 4, 4
    with pytest.raises(ValueError, match=f"{CONFIG}: num_attention_heads: got 2, expected 4 of this model"):
        fastprefix.load(transformers.LlamaForCausalLM(config), tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_what_load_would_refuse_is_not_saved(kind: str, tmp_path: Path) -> None:
    saved(tmp_path, kind)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    model = tiny_model()
    prefix = fastprefix.load(model, tmp_path)
    with torch.no_grad():
        next(iter(prefix.parameters())).view(-1)[0] = float("nan")
    with pytest.raises(ValueError, match=r"prefix 'default': \S+: got nan or infinite numbers, expected finite"):
        fastprefix.save(model, tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


@pytest.mark.parametrize("what", ["nan", "MLP's shape", "nan in a prompt", "truncated weights", "other numbers"])
def test_a_checkpoint_is_refused_as_a_whole(what: str, tmp_path: Path) -> None:
    kind, change, message = WRONG[what]
    saved(tmp_path, kind)
    prefix = fastprefix.load(tiny_model(), tmp_path)
    before = [p.detach().clone() for p in prefix.parameters()]
    change(tmp_path)
    with pytest.raises(ValueError, match=message):
        restore(prefix, tmp_path)
    assert all(torch.equal(p, b) for p, b in zip(prefix.parameters(), before, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_folders_of_before_load(kind: str, tmp_path: Path) -> None:
    """Without a digest of the MLP, and without fields that came later."""
    want = saved(tmp_path, kind)
    data = json.loads((tmp_path / OWN).read_text())
    (tmp_path / OWN).write_text(json.dumps({n: x for n, x in data.items() if n not in ("encoder_weights", "parts")}))
    assert same(numbers(fastprefix.load(tiny_model(), tmp_path)), want)


def test_what_peft_trained_beside_the_prefix_is_not_lost_silently(tmp_path: Path) -> None:
    """A classifier's head lies in PEFT's file: in a model without one the prefix would compute something else."""
    import peft

    def classifier() -> Any:
        return transformers.BertForSequenceClassification(transformers.BertConfig(**ROWS["bert"].options))

    config = peft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3)
    peft.get_peft_model(classifier(), config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"classifier.*: got a tensor that is no part of a prefix"):
        fastprefix.load(classifier().bert, tmp_path)
    fastprefix.load(classifier(), tmp_path)
