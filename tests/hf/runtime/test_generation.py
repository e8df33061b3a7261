"""Every way of generating equals a plain, cache-less, step-by-step argmax of the same model with its prefix."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastprefix
from fastprefix import PrefixConfig
from tests.model_zoo.architectures import ROWS, VOCAB

P, S, NEW = 5, 7, 6
MODELS = ["llama_gqa", "gpt2", "gemma3", "mistral_window"]


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    model = ROWS[request.param].build()
    fastprefix.attach(model, PrefixConfig(P, init=fastprefix.init.normal(0.6)))
    return model


@pytest.fixture
def batch() -> dict[str, Tensor]:
    ids = torch.randint(3, VOCAB, (2, S))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def greedy(model: Any, batch: dict[str, Tensor], new: int = NEW) -> Tensor:
    """The truth: argmax, append, start again from nothing."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    for _ in range(new):
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    return ids


def generate(model: Any, batch: dict[str, Tensor], **options: Any) -> Any:
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, **options}
    return model.generate(**batch, **options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"cache_implementation": "dynamic"},
        {"prompt_lookup_num_tokens": 2},
    ],
    ids=lambda o: next(iter(map(str, o.items())), "default"),
)
def test_greedy(model: Any, batch: dict[str, Tensor], options: dict[str, Any]) -> None:
    if "prompt_lookup_num_tokens" in options:
        batch = {name: x[1:] for name, x in batch.items()}  # transformers takes one sample here
    want = greedy(model, batch)
    assert torch.equal(generate(model, batch, **options), want)
    fastprefix.set_prefix(model, None)
    assert not torch.equal(generate(model, batch, **options), want), "the prefix made no difference"


def test_the_prefix_is_not_in_the_cache(model: Any, batch: dict[str, Tensor]) -> None:
    out = generate(model, batch, return_dict_in_generate=True)
    assert out.past_key_values.get_seq_length() == S + NEW - 1


def test_sampling_is_reproducible_and_follows_the_prefix(model: Any, batch: dict[str, Tensor]) -> None:
    draws = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        draws.append(generate(model, batch, do_sample=True, top_k=10, num_return_sequences=3, use_cache=use_cache))
    assert draws[0].shape == (6, S + NEW) and torch.equal(*draws)


def test_beams(model: Any, batch: dict[str, Tensor]) -> None:
    options = {"num_beams": 3, "num_return_sequences": 2}
    assert torch.equal(generate(model, batch, **options), generate(model, batch, **options, use_cache=False))


def test_assisted(model: Any, batch: dict[str, Tensor]) -> None:
    batch = {name: x[1:] for name, x in batch.items()}
    assistant = ROWS["llama_mha"].build()
    assert torch.equal(generate(model, batch, assistant_model=assistant), greedy(model, batch))


def test_a_second_turn_reuses_the_cache(model: Any, batch: dict[str, Tensor]) -> None:
    batch = {name: x[1:] for name, x in batch.items()}
    first = generate(model, batch, return_dict_in_generate=True)
    turn = torch.cat([first.sequences, torch.randint(3, VOCAB, (1, 4))], 1)
    whole = {"input_ids": turn, "attention_mask": torch.ones_like(turn)}
    assert torch.equal(generate(model, whole, past_key_values=first.past_key_values), greedy(model, whole))


def test_inputs_embeds(model: Any, batch: dict[str, Tensor]) -> None:
    embeds = model.get_input_embeddings()(batch["input_ids"])
    got = generate(model, {"inputs_embeds": embeds, "attention_mask": batch["attention_mask"]})
    assert torch.equal(got, greedy(model, batch)[:, S:])


def test_chunked_prefill_equals_one_forward(model: Any) -> None:
    ids = torch.randint(3, VOCAB, (2, 9))
    want = model(input_ids=ids, use_cache=False).logits
    cache, rows = None, []
    for part in ids.split([4, 1, 4], 1):
        out = model(input_ids=part, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        rows.append(out.logits)
    torch.testing.assert_close(torch.cat(rows, 1), want, rtol=1e-4, atol=1e-4)


def test_too_long_for_learned_positions_says_so() -> None:
    model = ROWS["gpt2"].build()
    fastprefix.attach(model, PrefixConfig(P))
    with pytest.raises(ValueError, match=r"position_ids: got 64, expected at most 63.*position_offset='none' frees 5"):
        model(input_ids=torch.randint(3, VOCAB, (1, 60)))
