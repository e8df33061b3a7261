"""Encoder-decoders: three prefixes, equal to explicit concatenation in every forward and every way to generate."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastprefix
from fastprefix import PrefixConfig
from tests.model_zoo.architectures import one_of_each_kind
from tests.model_zoo.encoder_decoders import (
    ALL,
    KIN,
    ROWS,
    P,
    S,
    attached,
    batch,
    cast,
    count_hooks,
    key_values,
    move_positions,
    source,
)
from tests.model_zoo.inputs import gradients, without_dropout
from tests.support.concat_oracle import concatenating, run_concat
from tests.support.model_error_rule import StayingInDouble, assert_model_rule

CHOICES = [("encoder", "decoder", "cross"), ("encoder",), ("decoder",), ("cross",)]


def logits(result: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Those of the targets' real tokens."""
    mask = inputs.get("decoder_attention_mask")
    return result.logits if mask is None else result.logits[mask.bool()]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("parts", CHOICES)
@pytest.mark.parametrize("name", ROWS)
def test_equals_explicit_concatenation(name: str, parts: tuple[str, ...], padded: bool) -> None:
    """Each part alone and all of them; every number of every layer's keys and values gets its gradient."""
    model, prefix = attached(name, parts=parts)
    inputs = cast(batch(name, padded), torch.float64)
    got = logits(model(**inputs), inputs)
    grads = gradients(got, list(prefix.parameters()))
    pairs = key_values(model, prefix, leaves=True)
    assert {part for part in prefix.parts} == set(parts)
    assert len(pairs) == sum({"encoder": 3 if "t5" in name else 2}.get(part, 3) for part in parts)
    # Whisper takes position ids: there left padding counts for nothing, as in its generate.
    check(model, pairs, inputs, got, grads, **(counted(inputs) if name == "whisper" and padded else {}))


def counted(inputs: dict[str, Tensor], first: int = 0) -> dict[str, Tensor]:
    """The targets' position ids, real tokens alone counted."""
    mask = inputs.get("decoder_attention_mask", torch.ones(3, S, dtype=torch.long))
    return {"decoder_position_ids": (mask.cumsum(1) - 1).clamp(min=0) + first}


def check(
    model: Any, pairs: Any, inputs: dict[str, Tensor], got: Tensor, grads: tuple[Tensor, ...], **extra: Any
) -> None:
    """Logits and gradients are those of explicit concatenation."""
    fastprefix.detach(model)
    move_positions(model, P)

    def oracle() -> list[Tensor]:
        want = logits(run_concat(model, pairs, **inputs, **extra), inputs)
        return [want, *gradients(want, [x for kv in pairs.values() for x in kv])]

    eager = oracle()
    assert all((x.abs().sum(-1) > 0).all() for x in eager[1:]), "a head's prefix token without a gradient"
    with StayingInDouble():
        truth = oracle()
    assert_model_rule([got, *grads], eager, truth)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", KIN)
def test_their_kin_equal_explicit_concatenation(name: str, padded: bool) -> None:
    model, prefix = attached(name)
    inputs = batch(name, padded)
    got = logits(model(**inputs), inputs)
    grads = gradients(got, list(prefix.parameters()))
    extra = counted(inputs, first=P) if name == "t5gemma" else {}
    check(model, key_values(model, prefix, leaves=True), inputs, got, grads, **extra)


@pytest.mark.slow
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", ALL)
def test_generate_equals_explicit_concatenation(name: str, beams: int) -> None:
    """Greedily and with beams, through caches of self- and cross-attention."""
    # T5Gemma's rotary positions cannot be moved from outside of generate.
    options = {"position_offset": "none"} if name == "t5gemma" else {}
    model, prefix = attached(name, torch.float32, **options)
    inputs = source(batch(name, padded=True))
    got = generated(model, inputs, beams)
    fastprefix.set_prefix(model, None)
    assert (generated(model, inputs, beams)[1] - got[1]).abs().max() > 0.1
    fastprefix.set_prefix(model, "default")
    pairs = {n: (k.detach(), v.detach()) for n, (k, v) in key_values(model, prefix).items()}
    fastprefix.detach(model)
    move_positions(model, P)
    with concatenating(model, pairs) as twin:
        want = generated(twin, inputs, beams)
    assert torch.equal(got[0], want[0])
    torch.testing.assert_close(got[1], want[1], rtol=1e-3, atol=1e-3)


def generated(model: Any, inputs: dict[str, Tensor], beams: int) -> tuple[Tensor, Tensor]:
    """Tokens, and the scores ``[steps, B * beams, V]`` that they were chosen by."""
    out = model.generate(
        **inputs, max_new_tokens=7, num_beams=beams, do_sample=False, eos_token_id=None,
        output_scores=True, return_dict_in_generate=True,
    )  # fmt: skip
    return out.sequences, torch.stack(out.scores)


@pytest.mark.parametrize("name", ROWS)
def test_positions_may_stay(name: str) -> None:
    """position_offset="none": the decoder's content starts at 0."""
    model, prefix = attached(name, position_offset="none")
    inputs = cast(batch(name), torch.float64)
    got = model(**inputs).logits
    pairs = key_values(model, prefix)
    fastprefix.detach(model)
    torch.testing.assert_close(got, run_concat(model, pairs, **inputs).logits, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize(("name", "projected"), [(name, name == "bart") for name in ALL])
def test_gradient_checkpointing(name: str, projected: bool, reentrant: bool) -> None:
    model, prefix = attached(name, prefix_projection=projected)
    inputs = {**cast(batch(name, padded=True), torch.float64), "use_cache": False}
    without_dropout(model)
    model.train()
    want = gradients(logits(model(**inputs), inputs), list(prefix.parameters()))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    x = logits(model(**inputs), inputs)
    (x * torch.sin(torch.arange(x.numel(), dtype=x.dtype)).view(x.shape)).sum().backward()
    for parameter, expected in zip(prefix.parameters(), want, strict=True):
        assert parameter.grad is not None and expected.abs().max() > 0
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-9, atol=1e-9)


# Relative and learned positions, sounds, and one attention for the decoder's own and the encoder's keys.
@pytest.mark.slow
@pytest.mark.parametrize("name", one_of_each_kind(ALL, ("t5", "bart", "whisper", "t5gemma")))
def test_compiled(name: str) -> None:
    torch._dynamo.reset()
    model, prefix = attached(name, torch.float32)
    inputs = batch(name)
    x = model(**inputs, use_cache=False).logits
    want = gradients(x, list(prefix.parameters()))
    compiled = torch.compile(model, backend="aot_eager")
    y = compiled(**inputs, use_cache=False).logits
    torch.testing.assert_close(y, x, rtol=1e-4, atol=1e-4)
    for got, expected in zip(gradients(y, list(prefix.parameters())), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3 * max(1.0, expected.abs().max().item()))


@pytest.mark.parametrize("name", ALL)
def test_detached_is_bit_for_bit_what_it_was(name: str) -> None:
    model, inputs = ALL[name].build(), batch(name, padded=True)
    model.requires_grad_(False)  # SDPA takes another way where a bias wants a gradient
    before, config = model(**inputs).logits, model.config
    modules, hooks = [n for n, _ in model.named_modules()], count_hooks(model)
    fastprefix.attach(model, PrefixConfig(P, prefix_projection=True))
    assert not torch.equal(model(**inputs).logits, before)
    fastprefix.set_prefix(model, None)
    assert torch.equal(model(**inputs).logits, before)
    fastprefix.detach(model)
    assert torch.equal(model(**inputs).logits, before) and model.config is config
    assert [n for n, _ in model.named_modules()] == modules and count_hooks(model) == hooks


@pytest.mark.parametrize("name", [name for name in ALL if name != "t5gemma"])
def test_a_static_cache(name: str) -> None:
    model, _ = attached(name, torch.float32)
    inputs = source(batch(name))
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    want = model.generate(**inputs, **options)
    assert torch.equal(model.generate(**inputs, **options, cache_implementation="static"), want)


def test_masks_made_in_advance_need_their_positions() -> None:
    """T5Gemma's static caches: which tokens are padding is no longer to be seen."""
    model, _ = attached("t5gemma", torch.float32)
    with pytest.raises(ValueError, match="position_ids: got None beside masks made in advance"):
        model.generate(**source(batch("t5gemma")), max_new_tokens=3, cache_implementation="static")
