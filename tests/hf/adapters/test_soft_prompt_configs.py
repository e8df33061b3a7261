"""Soft prompts: where they start, the files they are saved in, and wrong configurations."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import fastprefix
from fastprefix import PromptConfig, init
from tests.model_zoo.architectures import ROWS
from tests.support.soft_prompts import prompted, tokens

P, B, S = 5, 3, 7


def test_starts_from_tokens() -> None:
    model = ROWS["llama_gqa"].build()
    prompt = fastprefix.attach(model, PromptConfig(4, init=init.token_ids([5, 6])))
    torch.testing.assert_close(prompt.embedding.data, model.get_input_embeddings().weight[[5, 6, 5, 6]])
    other = fastprefix.attach(model, PromptConfig(4), name="other")
    table = model.get_input_embeddings().weight
    assert all((row == table).all(1).any() for row in other.embedding.data)
    assert not any(p.requires_grad for n, p in model.named_parameters() if "fastprefix" not in n)


def test_saves_and_loads(tmp_path: Any) -> None:
    bare, model, _ = prompted("llama_gqa", torch.float32)
    want = model(input_ids=tokens()).logits
    fastprefix.save(model, tmp_path)
    fastprefix.load(bare, tmp_path)
    torch.testing.assert_close(bare(input_ids=tokens()).logits, want)


def test_peft_reads_and_writes_the_same_files(tmp_path: Any) -> None:
    peft = pytest.importorskip("peft")
    bare, model, _ = prompted("llama_gqa", torch.float32)
    fastprefix.save(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(bare), tmp_path / "ours").eval()
    want = theirs(input_ids=tokens()).logits[:, P:]
    torch.testing.assert_close(model(input_ids=tokens()).logits, want, rtol=1e-4, atol=1e-4)
    theirs.save_pretrained(tmp_path / "theirs")
    fastprefix.load(bare, tmp_path / "theirs")
    torch.testing.assert_close(bare(input_ids=tokens()).logits, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_virtual_tokens": 0}, "num_virtual_tokens: got 0, expected an int of at least 1"),
        ({"num_virtual_tokens": 2, "init": "text"}, "init: got 'text', expected"),
        ({"num_virtual_tokens": 2, "init": init.kv([torch.zeros(1, 2, 4)], [torch.zeros(1, 2, 4)])}, "init: got 'kv'"),
    ],
)
def test_wrong_configurations(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PromptConfig(**arguments)
