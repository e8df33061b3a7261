"""Where a prefix could be ignored, or a position or mask be silently wrong: each case was once found so."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers

import fastprefix
from fastprefix import PrefixConfig, init
from fastprefix.hf.attention import masks
from fastprefix.hf.model.causality import sees_the_future
from fastprefix.hf.model.layers import AttentionStack
from tests.model_zoo.architectures import ROWS, VOCAB

P, S = 5, 9


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(3, VOCAB, (2, S))


def attached(name: str = "llama_gqa", **options: Any) -> Any:
    model = ROWS[name].build()
    fastprefix.attach(model, PrefixConfig(P, init=init.normal(0.6), **options))
    return model


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("other", [None, "b"])
def test_recomputation_sees_the_prefix_of_the_forward(ids: torch.Tensor, other: str | None, reentrant: bool) -> None:
    """Self-distillation: the bare model, or another prefix, runs between a forward and its backward."""
    model = attached()
    fastprefix.attach(model, PrefixConfig(P, init=init.normal(0.6)), "b")
    fastprefix.set_prefix(model, "default")
    mine = list(model._fastprefix.selection.prefixes["default"].parameters())
    model.train()
    want = torch.autograd.grad(model(ids).logits.sin().sum(), mine)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    student = model(ids).logits
    fastprefix.set_prefix(model, other)
    with torch.no_grad():
        model(ids)
    student.sin().sum().backward()
    assert model._fastprefix.selection.active == other
    for parameter, expected in zip(mine, want, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-5)
    assert all(p.grad is None for p in model._fastprefix.selection.prefixes["b"].parameters())
    layer = model.model.layers[0]
    fastprefix.detach(model)
    assert "_Recompute" not in type(layer._gradient_checkpointing_func).__name__


def test_another_implementation_set_meanwhile_is_an_error(ids: torch.Tensor) -> None:
    model = attached()
    model(ids)
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="attn_implementation: got 'sdpa', set while a prefix is attached"):
        model(ids)


@pytest.mark.parametrize("name", ["llama_gqa", "gpt2"])
def test_a_mask_that_reaches_further_than_the_forward(name: str, ids: torch.Tensor) -> None:
    model, mask = attached(name), torch.ones(2, S, dtype=torch.long)
    mask[0, :2] = 0
    want = model(ids, attention_mask=mask).logits
    cache = transformers.DynamicCache(config=model.config)
    rows = [model(part, attention_mask=mask, past_key_values=cache).logits for part in ids.split([4, 5], 1)]
    torch.testing.assert_close(torch.cat(rows, 1)[mask.bool()], want[mask.bool()], rtol=1e-4, atol=1e-4)
    static = transformers.StaticCache(config=model.config, max_cache_len=16)
    long = torch.nn.functional.pad(mask, (0, 16 - S), value=1)
    got = model(ids, attention_mask=long, past_key_values=static).logits
    torch.testing.assert_close(got[mask.bool()], want[mask.bool()], rtol=1e-4, atol=1e-4)


def test_a_roberta_decoder_counts_its_past(ids: torch.Tensor) -> None:
    torch.manual_seed(0)
    model = transformers.RobertaForCausalLM(
        transformers.RobertaConfig(**ROWS["roberta"].options, is_decoder=True)
    ).eval()
    fastprefix.attach(model, PrefixConfig(P, init=init.normal(0.6)))
    cache = transformers.DynamicCache()
    rows = [model(part, past_key_values=cache, use_cache=True).logits for part in ids.split([4, 5], 1)]
    torch.testing.assert_close(torch.cat(rows, 1), model(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("masked", [False, True])
def test_an_encoder_that_does_not_say_so_stays_bidirectional(masked: bool, ids: torch.Tensor) -> None:
    torch.manual_seed(0)
    model = transformers.SplinterModel(transformers.SplinterConfig(**ROWS["bert"].options)).eval()
    fastprefix.attach(model, PrefixConfig(P, init=init.normal(0.6)))
    extra = {"attention_mask": torch.ones(2, S)} if masked else {}
    changed = ids.clone()
    changed[:, -1] = 3
    difference = (model(changed, **extra)[0] - model(ids, **extra)[0])[:, 0].abs().max()
    assert difference > 1e-6


def test_a_model_that_merges_masks_by_itself_is_refused() -> None:
    torch.manual_seed(0)
    model = transformers.DogeForCausalLM(transformers.DogeConfig(**ROWS["llama_gqa"].options))
    if sees_the_future(AttentionStack(model, model.model, (), "input_ids", causal=True, layers=())):
        pytest.skip("this transformers' own Doge is not causal: there is nothing to lose")
    with pytest.raises(ValueError, match=r"DogeForCausalLM, whose attention .* makes masks of its own"):
        fastprefix.attach(model, PrefixConfig(P))


@pytest.mark.parametrize("name", ["gpt_oss", "opt"])
def test_packing_is_refused_where_masks_do_not_know_positions(name: str, ids: torch.Tensor) -> None:
    model = attached(name)
    with pytest.raises(ValueError, match="position_ids: got packed documents"):
        model(ids[:1, :8], position_ids=torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]]))
    model(ids[:1, :8], position_ids=torch.arange(8)[None])


def test_an_encoder_may_be_given_any_position_ids(ids: torch.Tensor) -> None:
    model = attached("roberta")
    model(ids, position_ids=torch.tensor([[2, 3, 4, 5, 6, 1, 1, 1, 1]]))


def test_attaching_around_an_attached_model_is_refused() -> None:
    model = ROWS["llama_gqa"].build()
    fastprefix.attach(model.model, PrefixConfig(P))
    with pytest.raises(ValueError, match="model: got LlamaForCausalLM around a model with a prefix"):
        fastprefix.attach(model, PrefixConfig(P))
    fastprefix.detach(model.model)
    fastprefix.attach(model, PrefixConfig(P))


def test_detach_through_a_wrapper() -> None:
    model = attached()
    fastprefix.detach(torch.compile(model))
    assert not hasattr(model, "_fastprefix")
    fastprefix.attach(model, PrefixConfig(2))


def test_what_was_changed_in_the_config_meanwhile_stays(ids: torch.Tensor) -> None:
    model = ROWS["llama_gqa"].build()
    config = model.config
    fastprefix.attach(model, PrefixConfig(P))
    model.resize_token_embeddings(VOCAB + 6)
    model.config.use_cache = False
    fastprefix.detach(model)
    assert model.config is config and config.vocab_size == VOCAB + 6 and config.use_cache is False
    assert config._attn_implementation == "sdpa" and model(ids).logits.shape[-1] == VOCAB + 6


def test_several_choices_a_sample() -> None:
    torch.manual_seed(0)
    model = transformers.GPT2DoubleHeadsModel(transformers.GPT2Config(**ROWS["gpt2"].options)).eval()
    fastprefix.attach(model, PrefixConfig(P, init=init.normal(0.6)))
    choices = torch.randint(3, VOCAB, (2, 3, 7))
    together = model(choices, mc_token_ids=torch.full((2, 3), 6)).logits
    alone = [model(choices[:, i : i + 1], mc_token_ids=torch.full((2, 1), 6)).logits for i in range(3)]
    torch.testing.assert_close(together, torch.cat(alone, 1), rtol=1e-4, atol=1e-4)


def test_attached_under_inference_mode_it_still_trains(ids: torch.Tensor) -> None:
    model = ROWS["llama_gqa"].build()
    with torch.inference_mode():
        prefix = fastprefix.attach(model, PrefixConfig(P, init=init.token_ids([4, 5])))
    model(ids).logits.sum().backward()
    assert all(p.grad is not None for p in prefix.parameters())


def test_a_paged_cache_is_refused() -> None:
    """What continuous batching hands to the attention function."""
    from fastprefix.hf.attention.function import attention_forward

    x = torch.randn(1, 2, 3, 8)
    with pytest.raises(ValueError, match="cache: got a paged cache"):
        attention_forward(torch.nn.Module(), x, x, x, cache=object())


def test_continuous_batching_is_refused_at_its_entry() -> None:
    """Its errors end in a thread of its own: generate_batch would return empty texts."""
    model, prompts = attached(), [[1, 5, 6], [1, 7]]
    options = transformers.GenerationConfig(max_new_tokens=3, do_sample=False, eos_token_id=-1, pad_token_id=0)
    model.set_attn_implementation("sdpa")
    for each in (model, copy.deepcopy(model)):
        for entry in (each.generate_batch, each.init_continuous_batching):
            with pytest.raises(ValueError, match="LlamaForCausalLM with a prefix, in continuous batching"):
                entry(prompts if entry == each.generate_batch else options)
    fastprefix.set_prefix(model, None)
    assert type(model.init_continuous_batching(options)).__name__ == "ContinuousBatchingManager"
    fastprefix.detach(model)
    assert "init_continuous_batching" not in vars(model)


def test_attention_without_anything_attached_is_plain_attention(ids: torch.Tensor) -> None:
    model = ROWS["llama_gqa"].build()
    want = model(ids).logits
    assert fastprefix.attach is not None  # its import is what registers the name
    model.set_attn_implementation("fastprefix")
    torch.testing.assert_close(model(ids).logits, want, rtol=1e-5, atol=1e-5)


def test_an_error_in_a_packed_forward_leaves_nothing_behind() -> None:
    model = attached("gpt2")
    whole = torch.randint(3, VOCAB, (1, 6))
    want = model(whole).logits
    with pytest.raises(ValueError, match="position_ids: got"):
        model(whole, position_ids=torch.tensor([[0, 1, 2, 90, 91, 92]]))
    assert masks.requested.boundary is None
    torch.testing.assert_close(model(whole).logits, want)
