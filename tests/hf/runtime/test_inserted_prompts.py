"""Soft prompts inside the text equal their embeddings put into every row by hand, in fp64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import fastprefix
from fastprefix import PrefixConfig, PromptConfig, init
from tests.hf.runtime.inserted_prompts import (
    MARKER,
    B,
    Batch,
    P,
    S,
    batch,
    generated_by_hand,
    inserted,
    logits_and_loss,
)
from tests.model_zoo.architectures import ROWS, VOCAB
from tests.support.model_error_rule import StayingInDouble, assert_model_rule

# Rotary and learned positions, those that the mask counts, windows in all or some layers, queries scaled by position.
MODELS = ["llama_gqa", "gpt2", "opt", "mistral_window", "gemma3", "ministral3"]
PLACES: list[Any] = ["after", MARKER]
GREEDY: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def real(rows: Batch) -> Tensor:
    return torch.ones_like(rows.ids).bool() if rows.mask is None else rows.mask.bool()


def wanted(bare: Any, prompt: Any, rows: Batch, place: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Logits, loss and gradient by hand: as the model rounds, and in fp64 throughout."""

    def oracle() -> list[Tensor]:
        twin = prompt.embedding.detach().clone().requires_grad_()
        logits, loss = logits_and_loss(bare, twin, rows, place)
        return [logits, loss, *torch.autograd.grad(loss, [twin])]

    eager = oracle()
    with StayingInDouble():
        return eager, oracle()


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", MODELS)
def test_equals_embeddings_in_every_row(name: str, place: Any, side: str) -> None:
    bare, model, prompt = inserted(name, place)
    rows = batch(place, side)
    eager, truth = wanted(bare, prompt, rows, place)
    got = model(input_ids=rows.ids, attention_mask=rows.mask, labels=rows.labels)
    assert got.logits.shape == (B, S, VOCAB)
    got.loss.backward()
    assert_model_rule([got.logits[real(rows)], got.loss, prompt.embedding.grad], eager, truth)
    assert prompt.embedding.grad.abs().max() > 1e-4


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("place", PLACES)
def test_under_gradient_checkpointing(place: Any, reentrant: bool) -> None:
    bare, model, prompt = inserted("llama_gqa", place)
    rows = batch(place, "left")
    model.train().gradient_checkpointing_enable({"use_reentrant": reentrant})
    eager, truth = wanted(bare, prompt, rows, place)
    got = model(input_ids=rows.ids, attention_mask=rows.mask, labels=rows.labels)
    got.loss.backward()
    assert_model_rule([got.logits[real(rows)], got.loss, prompt.embedding.grad], eager, truth)


@pytest.mark.parametrize("place", PLACES)
def test_compiled(place: Any) -> None:
    _, model, prompt = inserted("llama_gqa", place)
    rows = batch(place, "left")
    inputs = {"input_ids": rows.ids, "attention_mask": rows.mask, "labels": rows.labels, "use_cache": False}
    want = model(**inputs)
    (wanted,) = torch.autograd.grad(want.loss, [prompt.embedding])
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    got = compiled(**inputs)
    got.loss.backward()
    torch.testing.assert_close(got.logits[real(rows)], want.logits[real(rows)], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(prompt.embedding.grad, wanted, rtol=1e-6, atol=1e-6)
    with pytest.raises((ValueError, RuntimeError), match=r"input_ids: got|labels: got"):
        compiled(**{**inputs, "input_ids": rows.ids.clamp(min=3), "labels": rows.ids})


@pytest.mark.parametrize("place", PLACES)
def test_hidden_states_are_those_of_the_text(place: Any) -> None:
    _, model, _ = inserted("llama_gqa", place)
    rows = batch(place)
    for options in ({}, {"return_dict": False}):
        output = model.model(input_ids=rows.ids, output_hidden_states=True, **options)
        states = output.hidden_states if not options else output[-1]
        assert {tuple(x.shape[:2]) for x in (output[0], *states)} == {(B, S)}
        torch.testing.assert_close(states[-1], output[0])


@pytest.mark.parametrize("side", ["none", "left"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", ["llama_gqa", "gpt2", "mistral_window", "gemma3"])
def test_generates(name: str, place: Any, side: str) -> None:
    bare, model, prompt = inserted(name, place)
    rows = batch(place, side)
    got = model.generate(rows.ids, attention_mask=rows.mask, **GREEDY, suppress_tokens=[MARKER])
    want = generated_by_hand(bare, prompt.embedding, rows, place, 5)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("place", PLACES)
def test_beams_and_samples(place: Any) -> None:
    _, model, _ = inserted("llama_gqa", place)
    rows = batch(place, "left")
    assert rows.mask is not None
    options = {**GREEDY, "num_beams": 3, "num_return_sequences": 2, "suppress_tokens": [MARKER]}
    got = model.generate(rows.ids, attention_mask=rows.mask, **options)
    alone = [model.generate(rows.ids[i : i + 1, i:], **options) for i in range(B)]
    for i, each in enumerate(alone):
        torch.testing.assert_close(got[2 * i : 2 * i + 2, i:], each)
    options = {**GREEDY, "do_sample": True, "suppress_tokens": [MARKER]}
    torch.manual_seed(3)
    sampled = model.generate(rows.ids, attention_mask=rows.mask, **options)
    torch.manual_seed(3)
    torch.testing.assert_close(sampled, model.generate(rows.ids, attention_mask=rows.mask, **options))
    assert sampled.shape == (B, S + 5)


@torch.no_grad()
def test_a_cache_goes_on_with_a_later_turn() -> None:
    """The marker's prompt stays in the cache; a later turn equals the whole text."""
    _, model, _ = inserted("llama_gqa", MARKER)
    rows = batch(MARKER, "left")
    assert rows.mask is not None
    later = torch.randint(3, VOCAB, (B, 4))
    ids, mask = torch.cat([rows.ids, later], 1), torch.cat([rows.mask, torch.ones_like(later)], 1)
    want = model(input_ids=ids, attention_mask=mask).logits[:, S:]
    cache = model(input_ids=rows.ids, attention_mask=rows.mask, use_cache=True).past_key_values
    cache = copy.deepcopy(cache)
    got = model(input_ids=later, attention_mask=mask, past_key_values=cache).logits
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_a_marker_needs_no_place_in_the_embedding_table() -> None:
    bare, model, prompt = inserted("llama_gqa", VOCAB + 1)
    rows = batch(MARKER)
    ids = rows.ids.masked_fill(rows.ids == MARKER, VOCAB + 1)
    got = model(input_ids=ids, labels=ids)
    labels = rows.ids.clone()
    labels[:, 0] = -100
    _, loss = logits_and_loss(bare, prompt.embedding, rows._replace(labels=labels), MARKER)
    torch.testing.assert_close(got.loss.double(), loss.double(), rtol=1e-5, atol=1e-5)


def test_a_classifier_pools_the_prompt_after_the_text() -> None:
    """Its last token is the prompt's, as if the embeddings stood there."""
    torch.manual_seed(0)
    config = copy.deepcopy(ROWS["llama_gqa"].build().config)
    config.pad_token_id, config.num_labels = 0, 3
    classifier = transformers.LlamaForSequenceClassification(config).double().eval()
    bare = copy.deepcopy(classifier)
    prompt = fastprefix.attach(classifier, PromptConfig(P, init=init.normal(1.0), place="after"))
    rows = batch("after", "right")
    assert rows.mask is not None
    got = classifier(input_ids=rows.ids * rows.mask, attention_mask=rows.mask).logits
    for i in range(B):
        own = bare.get_input_embeddings()(rows.ids[i][rows.mask[i].bool()])
        states = bare.model(inputs_embeds=torch.cat([own, prompt.embedding.double()])[None]).last_hidden_state
        torch.testing.assert_close(got[i], bare.score(states[0, -1]), rtol=1e-6, atol=1e-6)


def test_a_prompt_for_each_row() -> None:
    bare, model, first = inserted("llama_gqa", MARKER)
    second = fastprefix.attach(model, PromptConfig(P, init=init.normal(1.0), place=MARKER), "second")
    fastprefix.attach(model, PromptConfig(P, init=init.normal(1.0), place="after"), "after")
    fastprefix.attach(model, PromptConfig(P, init=init.normal(1.0)), "before")
    fastprefix.attach(model, PromptConfig(P + 1, init=init.normal(1.0), place=MARKER), "longer")
    fastprefix.attach(model, PrefixConfig(P), "prefix")
    rows = batch(MARKER)
    with fastprefix.prefix_batch(model, ["default", "second", "default"]):
        got = model(input_ids=rows.ids).logits
    for i, prompt in enumerate((first, second, first)):
        one = Batch(rows.ids[i : i + 1], None, rows.labels[i : i + 1], rows.start[i : i + 1])
        want, _ = logits_and_loss(bare, prompt.embedding.double(), one, MARKER)
        torch.testing.assert_close(got[i], want, rtol=1e-5, atol=1e-5)
    for names, complaint in (
        (["default", "after", "default"], r"names: got soft prompts with different places: 2, 'after'"),
        (["default", "before", "default"], "different places"),
        (["default", "longer", "default"], "of one length in every row"),
        (["default", None, "default"], "soft prompts inside the text.*, expected soft prompts of one length"),
        (["default", "prefix", "default"], "different places|and nothing else"),
        ([("default", "after"), "default", "default"], "soft prompts of one place behind each other"),
    ):
        with fastprefix.prefix_batch(model, names), pytest.raises(ValueError, match=complaint):
            model(input_ids=rows.ids)
