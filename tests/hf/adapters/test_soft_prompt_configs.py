"""Soft prompts: where they start, the files they are saved in, and wrong configurations."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch

import fastprefix
from fastprefix import PrefixConfig, PromptConfig, init
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


def spelling(text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
    """A tokenizer of one id for each letter, and special tokens around them."""
    ids = [3 + ord(letter) % 20 for letter in text.strip()]
    return {"input_ids": [1, *ids, 2] if add_special_tokens else ids}


def ids_of(*labels: str) -> list[list[int]]:
    return [spelling(label, add_special_tokens=False)["input_ids"] for label in labels]


def test_starts_from_labels_then_from_the_vocabulary() -> None:
    model = ROWS["llama_gqa"].build()
    table = model.get_input_embeddings().weight
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = PromptConfig(5, init=init.labels(["yes", "a", "no"], spelling))
        prompt = fastprefix.attach(model, config)
    want = torch.stack([table[ids].mean(0) for ids in ids_of("yes", "a", "no")])
    assert torch.equal(prompt.embedding[:3], want)
    assert all((row == table).all(1).any() for row in prompt.embedding[3:])
    torch.manual_seed(11)
    again = fastprefix.attach(model, config, "again")
    assert torch.equal(again.embedding[:3], want) and not torch.equal(again.embedding[3:], prompt.embedding[3:])


def test_labels_are_as_many_tokens_as_there_are_unless_told() -> None:
    start = init.labels(("yes", "no"), spelling)
    assert PromptConfig(init=start).num_virtual_tokens == 2
    with pytest.warns(UserWarning, match="init: 2 labels for num_virtual_tokens=1: only the first 1") as told:
        config = PromptConfig(1, init=start)
    assert told[0].filename == __file__
    model = ROWS["gemma2"].build()  # it scales its embeddings
    prompt = fastprefix.attach(model, config)
    want = model.get_input_embeddings()(torch.tensor(ids_of("yes"))).mean(1)
    torch.testing.assert_close(prompt.embedding.data, want)


def test_an_encoder_starts_at_labels() -> None:
    model = ROWS["llama_gqa"].build()
    start = init.labels(["yes", "no"], spelling)
    prompt = fastprefix.attach(model, PromptConfig(init=start, encoder="mlp", encoder_hidden_size=16))
    want = torch.stack([model.get_input_embeddings().weight[ids].mean(0) for ids in ids_of("yes", "no")])
    torch.testing.assert_close(prompt(), want, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("given", ["yes", [], ["yes", ""], ["yes", " "], ["yes", 3], {"yes"}], ids=str)
def test_what_are_no_labels(given: Any) -> None:
    with pytest.raises(ValueError, match=r"labels: got .*, expected a sequence of texts of at least one token each"):
        init.labels(given, spelling)


def test_labels_are_no_keys_and_values() -> None:
    with pytest.raises(ValueError, match=r"init: got init.labels of a soft prompt, expected what fastprefix.init.norm"):
        PrefixConfig(2, init=init.labels(["yes", "no"], spelling))
    with pytest.raises(ValueError, match=r"prefixes: got init.labels, expected what attach returns"):
        init.slice(init.labels(["yes", "no"], spelling), 1)
