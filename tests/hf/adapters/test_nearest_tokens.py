"""nearest_tokens: the same as a comparison with the whole vocabulary, in chunks, for prompts of every kind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastprefix
from fastprefix import PrefixConfig, PromptConfig, init
from fastprefix.hf.adapters import nearest_tokens as module
from tests.model_zoo.architectures import ROWS, VOCAB

P = 6
METRICS = ["cosine", "euclid"]


class Tokenizer:
    def decode(self, ids: list[int]) -> str:
        return f"<{ids[0]}>"


def whole(prompt: Tensor, table: Tensor, metric: str) -> Tensor:
    """Every score ``[P, V]``, in fp64."""
    prompt, table = prompt.detach().double(), table.detach().double()
    if metric == "cosine":
        return torch.nn.functional.cosine_similarity(prompt[:, None], table, dim=-1)
    return (prompt[:, None] - table).norm(dim=-1)


def table_of(model: Any) -> Tensor:
    return model.get_input_embeddings()(torch.arange(VOCAB))


@pytest.mark.parametrize("chunk", [1, 7, 4096])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("row", ["llama_gqa", "gemma2", "bert"])
def test_equals_a_comparison_with_all(row: str, metric: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK", chunk)
    model = ROWS[row].build()
    prompt = fastprefix.attach(model, PromptConfig(P, init=init.normal(0.3)))
    found = fastprefix.nearest_tokens(model, k=4, metric=metric)
    scores, ids = whole(prompt(), table_of(model), metric).topk(4, largest=metric == "cosine")
    assert torch.equal(found.ids, ids) and found.ids.dtype == torch.int64 and found.tokens is None
    torch.testing.assert_close(found.scores, scores.float())


@pytest.mark.parametrize("metric", METRICS)
def test_a_token_is_nearest_to_itself(metric: str) -> None:
    """At distance 0, to the last bit, in a model whose embeddings are far from 0 and near to each other."""
    model = ROWS["llama_gqa"].build()
    model.get_input_embeddings().weight.data.mul_(0.02).add_(30.0 if metric == "euclid" else 0.0)
    fastprefix.attach(model, PromptConfig(init=init.token_ids([9, 5, 20])))
    found = fastprefix.nearest_tokens(model, k=1, metric=metric, tokenizer=Tokenizer())
    assert found.tokens == [["<9>"], ["<5>"], ["<20>"]]
    if metric == "euclid":
        assert torch.equal(found.scores, torch.zeros(3, 1))
    else:
        torch.testing.assert_close(found.scores, torch.ones(3, 1))


def test_no_more_than_a_chunk_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK", 8)
    model = ROWS["llama_gqa"].build()
    fastprefix.attach(model, PromptConfig(P))
    seen: list[Tensor] = []
    model.get_input_embeddings().register_forward_hook(lambda m, args, output: seen.append(args[0]))
    found = fastprefix.nearest_tokens(model, k=3)
    *chunks, last = seen
    assert max(ids.numel() for ids in chunks) == 8 and torch.equal(torch.cat(chunks), torch.arange(VOCAB))
    assert last.shape == found.ids.shape == (P, 3)


def test_an_encoders_output_is_compared() -> None:
    model = ROWS["llama_gqa"].build()
    options: dict[str, Any] = {"encoder": "lstm", "encoder_hidden_size": 16, "encoder_dropout": 0.5}
    fastprefix.attach(model, PromptConfig(init=init.token_ids([9, 5, 20]), **options), "encoded")
    fastprefix.attach(model, PrefixConfig(3))
    model.train()
    found = fastprefix.nearest_tokens(model, "encoded", k=2)
    assert found.ids[:, 0].tolist() == [9, 5, 20] and not found.scores.requires_grad
    assert model.training and model.get_input_embeddings().training


@pytest.mark.parametrize("active", [True, False])
def test_a_prompts_own_embeddings_are_the_vocabulary(active: bool) -> None:
    """Where a prompt was trained with the embeddings, whether it is active or not."""
    model = ROWS["gpt2"].build()
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())  # untied
    prompt = fastprefix.attach(model, PromptConfig(P, init=init.normal(0.3), modules_to_save=["wte"]))
    (own,) = prompt.modules_to_save.named().values()
    with torch.no_grad():
        own.weight.copy_(own.weight.flip(0))
    if not active:
        fastprefix.set_prefix(model, None)
    found = fastprefix.nearest_tokens(model, k=3)
    assert torch.equal(found.ids, whole(prompt(), own.weight, "cosine").topk(3).indices)
    assert (model.get_input_embeddings() is own) == active


def test_all_of_the_vocabulary() -> None:
    model = ROWS["llama_gqa"].build()
    fastprefix.attach(model, PromptConfig(2))
    found = fastprefix.nearest_tokens(model, k=VOCAB)
    assert torch.equal(found.ids.sort(1).values, torch.arange(VOCAB).expand(2, -1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"name": "kv"},
            "name: got 'kv', a prefix of keys and values, expected a soft prompt: keys and",
        ),
        ({"name": "none"}, r"name: got 'none', expected one of \['default', 'kv'\]"),
        ({"k": 0}, f"k: got 0, expected an int from 1 to {VOCAB}"),
        ({"k": VOCAB + 1}, f"k: got {VOCAB + 1}, expected an int from 1 to {VOCAB}"),
        ({"k": 2.0}, "k: got 2.0, expected an int from 1"),
        ({"metric": "dot"}, "metric: got 'dot', expected 'cosine' or 'euclid'"),
        ({"tokenizer": len}, "tokenizer: got builtin_function_or_method, expected a tokenizer with a method decode"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], message: str) -> None:
    model = ROWS["llama_gqa"].build()
    fastprefix.attach(model, PromptConfig(2))
    fastprefix.attach(model, PrefixConfig(2), "kv")
    with pytest.raises(ValueError, match=message):
        fastprefix.nearest_tokens(model, **arguments)
