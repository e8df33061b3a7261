"""Soft prompts: run through the model once, equal to embeddings concatenated to every row, in fp64."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import fastprefix
from fastprefix import PrefixConfig, PromptConfig
from fastprefix.hf.adapters.lookup import require_installation
from tests.model_zoo import hybrids
from tests.model_zoo.architectures import ROWS
from tests.support.model_error_rule import StayingInDouble, assert_model_rule
from tests.support.soft_prompts import concatenated, padded, prompted, tokens

P, B, S = 5, 3, 7
REFUSED = ["gemma4", "clip_text"]  # they want token ids
CAUSAL = [
    name for name, row in ROWS.items()
    if row.generates and name not in (*REFUSED, *hybrids.ROWS) and "experts" not in row.notes
]  # fmt: skip
ENCODERS = ["bert", "roberta"]


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_takes_no_embeddings_is_refused(name: str) -> None:
    model = ROWS[name].build()
    with pytest.raises(ValueError, match=f"model: got {ROWS[name].cls}, which does not run on inputs_embeds alone"):
        fastprefix.attach(model, PromptConfig(P))
    assert "fastprefix" not in str(model) and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("name", CAUSAL)
def test_equals_concatenated_embeddings(name: str, side: str) -> None:
    bare, model, prompt = prompted(name)
    ids, mask = tokens(), padded(side) if side != "none" else None
    labels = ids if mask is None else ids.masked_fill(mask == 0, -100)
    if side == "left":
        labels[:, 1:][mask.diff(dim=1) == 1] = -100  # there concatenation has padding predict it
    real = torch.ones_like(ids).bool() if mask is None else mask.bool()

    def oracle() -> list[Tensor]:
        twin = prompt.embedding.detach().clone().requires_grad_()
        want = concatenated(bare, twin, ids, mask, labels=labels)
        return [want.logits[:, P:][real], want.loss, *torch.autograd.grad(want.loss, [twin])]

    eager = oracle()
    with StayingInDouble():
        truth = oracle()
    got = model(input_ids=ids, attention_mask=mask, labels=labels)
    assert got.logits.shape[:2] == ids.shape
    got.loss.backward()
    assert_model_rule([got.logits[real], got.loss, prompt.embedding.grad], eager, truth)
    assert prompt.embedding.grad.abs().max() > 1e-4


@pytest.mark.parametrize("name", ["llama_gqa", "gpt2"])
def test_is_computed_once_whatever_the_batch(name: str) -> None:
    _, model, _ = prompted(name)
    seen: list[int] = []
    owner = require_installation(model).facts.layers.main.owner
    layer = next(m for n, m in owner.named_modules() if n.endswith((".mlp", ".mlp.c_fc")) and n)
    layer.register_forward_hook(lambda module, args, output: seen.append(args[0].numel() // args[0].shape[-1]))
    model(input_ids=tokens())
    assert seen == [P, B * S]


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_concatenate_and_say_so(name: str) -> None:
    bare, model, prompt = prompted(name)
    ids = tokens()
    with pytest.warns(UserWarning, match="concatenated.*bidirectional"):
        got = model(input_ids=ids).last_hidden_state
    want = concatenated(bare, prompt.embedding, ids).last_hidden_state[:, P:]
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(input_ids=ids)  # said once


def test_active_dropout_concatenates_and_says_so() -> None:
    bare, model, prompt = prompted("gpt2", torch.float32)
    ids = tokens()
    assert bare.config.resid_pdrop > 0
    model.train(), bare.train()
    with pytest.warns(UserWarning, match="concatenated.*dropout"):
        torch.manual_seed(0)
        got = model(input_ids=ids, labels=ids)
    assert got.logits.shape[1] == S
    got.loss.backward()
    assert prompt.embedding.grad.abs().max() > 0
    # Without dropout the two ways meet: the same numbers, whichever is taken.
    model.eval(), bare.eval()
    shared = model(input_ids=ids, labels=ids).loss
    torch.testing.assert_close(shared, concatenated(bare, prompt.embedding, ids, labels=ids).loss)


@pytest.mark.parametrize("name", ["mistral_window", "gemma3"])
def test_a_window_shorter_than_the_text_is_the_model_s_own(name: str) -> None:
    bare, model, prompt = prompted(name, tokens=2)
    short, long = tokens(length=2), tokens(length=7)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = model(input_ids=short, use_cache=False).logits
    torch.testing.assert_close(got, concatenated(bare, prompt.embedding, short).logits[:, 2:], rtol=1e-6, atol=1e-6)
    with pytest.warns(UserWarning, match="window of 4"):
        got = model(input_ids=long, use_cache=False).logits
    torch.testing.assert_close(got, concatenated(bare, prompt.embedding, long).logits[:, 2:], rtol=1e-6, atol=1e-6)


def generated_by_hand(bare: Any, embedding: Tensor, ids: Tensor, mask: Tensor, steps: int) -> Tensor:
    for _ in range(steps):
        logits = concatenated(bare, embedding, ids, mask).logits[:, -1]
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
    return ids


@pytest.mark.parametrize("name", ["llama_gqa", "gpt2"])
@pytest.mark.parametrize(
    "options", [{}, {"use_cache": False}, {"num_beams": 2}, {"cache_implementation": "static"}], ids=str
)
def test_generates(name: str, options: dict[str, Any]) -> None:
    bare, model, prompt = prompted(name)
    ids, mask = tokens(), padded("left")
    arguments = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, **options}
    got = model.generate(ids, attention_mask=mask, **arguments)
    if "num_beams" in options:
        alone = [model.generate(ids[i : i + 1], attention_mask=mask[i : i + 1], **arguments) for i in range(B)]
        torch.testing.assert_close(got, torch.cat(alone))
        return
    torch.testing.assert_close(got, generated_by_hand(bare, prompt.embedding, ids, mask, 5))


@pytest.mark.parametrize("name", ["mistral_window", "gemma2"])
def test_generation_that_outgrows_a_window_is_exact_or_raises(name: str) -> None:
    """A prompt concatenated into a cache would be content ever after."""
    bare, model, prompt = prompted(name, tokens=2)
    ids, mask = tokens(length=2), torch.ones(B, 2, dtype=torch.long)
    options: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    want = generated_by_hand(bare, prompt.embedding, ids, mask, 4)
    with pytest.raises(ValueError, match=r"past_key_values: got a cache, .*window of 4.*, expected use_cache=False"):
        model.generate(ids, attention_mask=mask, max_new_tokens=4, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = model.generate(ids, attention_mask=mask, max_new_tokens=4, use_cache=False, **options)
    torch.testing.assert_close(got, want)
    with torch.no_grad():
        first = model(input_ids=ids, use_cache=True)
        with pytest.raises(ValueError, match="past_key_values"):
            model(input_ids=ids, past_key_values=first.past_key_values)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert model(input_ids=tokens(length=7)).past_key_values is None


def test_a_cache_filled_without_gradients_does_not_take_them_away() -> None:
    _, model, prompt = prompted("llama_gqa")
    ids = tokens()
    with torch.no_grad():
        cache = model(input_ids=ids[:, :3], use_cache=True).past_key_values
        model(input_ids=ids[:, 3:4], past_key_values=cache)
    model(input_ids=ids[:, 4:], past_key_values=cache).logits.sum().backward()
    assert prompt.embedding.grad is not None and prompt.embedding.grad.abs().max() > 0


def test_a_row_padded_on_the_left_has_its_first_token_predicted_by_the_prompt() -> None:
    _, model, _ = prompted("llama_gqa")
    ids, mask = tokens(), padded("left")
    with torch.no_grad():
        got = model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
        alone = [(model(input_ids=ids[i : i + 1, i:], labels=ids[i : i + 1, i:]).loss, S - i) for i in range(B)]
    torch.testing.assert_close(got, sum(loss * count for loss, count in alone) / sum(count for _, count in alone))


def test_a_generation_computes_it_once() -> None:
    _, model, _ = prompted("llama_gqa")
    seen: list[int] = []
    model.model.layers[0].mlp.register_forward_hook(lambda m, args, out: seen.append(args[0].shape[-2] * len(args[0])))
    model.generate(tokens(), max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert seen == [P, B * S, B, B, B]


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant: bool) -> None:
    _, model, prompt = prompted("llama_gqa")
    ids = tokens()
    model.train()
    model(input_ids=ids, labels=ids).loss.backward()
    want, prompt.embedding.grad = prompt.embedding.grad, None
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    torch.testing.assert_close(prompt.embedding.grad, want)


@pytest.mark.slow
def test_compiles() -> None:
    torch._dynamo.reset()  # models of other tests count towards its limit of recompilations
    _, model, prompt = prompted("llama_gqa", torch.float32)
    ids = tokens()
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    want, prompt.embedding.grad = prompt.embedding.grad, None
    torch.compile(model, fullgraph=True, backend="aot_eager")(
        input_ids=ids, labels=ids, use_cache=False
    ).loss.backward()
    torch.testing.assert_close(prompt.embedding.grad, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("dtype", [torch.bool, torch.float64])
def test_a_mask_of_the_caller_s_own_is_refused_where_the_prompt_is_concatenated(name: str, dtype: torch.dtype) -> None:
    """What the prompt's tokens see of a finished mask, and of numbers added to scores, nobody has said."""
    _, model, _ = prompted(name)
    mask = torch.ones(B, 1, S, S, dtype=torch.bool) if dtype == torch.bool else torch.zeros(B, 1, S, S, dtype=dtype)
    with pytest.raises(ValueError, match="attention_mask: got a mask made in advance"):
        model(input_ids=tokens(), attention_mask=mask)


@pytest.mark.parametrize(("config", "times"), [(PrefixConfig, 14), (PromptConfig, 21)])
def test_attach_runs_the_model_as_often_as_the_readme_says(config: Any, times: int) -> None:
    model, seen = ROWS["llama_gqa"].build(), []
    model.model.register_forward_pre_hook(lambda module, args: seen.append(1))
    fastprefix.attach(model, config(4))
    assert len(seen) == times
