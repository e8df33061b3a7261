"""Every architecture of the table: equal to explicit concatenation, to PEFT where PEFT is right, and to itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastprefix
from fastprefix import PrefixConfig
from fastprefix.hf.adapters.lookup import require_installation
from fastprefix.hf.storage.peft_format import pack
from fastprefix.prefixes.prefix import Prefix
from tests.model_zoo.architectures import REFUSED, ROWS, one_of_each_kind
from tests.model_zoo.inputs import P, S, gradients, inputs, output, positions, without_dropout
from tests.model_zoo.row import NO_CACHE, STATES, TWO_DIMS
from tests.support.concat_oracle import run_cached, run_concat
from tests.support.model_error_rule import StayingInDouble, assert_model_rule

PADDED = [(name, padding) for name, row in ROWS.items() for padding in row.paddings]
GENERATES = [name for name, row in ROWS.items() if row.generates]


def attached(name: str, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[Any, Prefix]:
    """A model with a random prefix in the model's dtype."""
    model = ROWS[name].build(dtype)
    prefix = fastprefix.attach(model, PrefixConfig(P, init=fastprefix.init.normal(0.6), **options))
    return model, prefix.to(dtype)


@pytest.mark.parametrize(("name", "padding"), PADDED)
def test_equals_explicit_concatenation(name: str, padding: str) -> None:
    model, prefix = attached(name)
    batch = inputs(name, padding)
    got = output(model, model(**batch), batch)
    grads = gradients(got, list(prefix.parameters()))
    modules = {id(m): n for n, m in model.named_modules()}
    state = require_installation(model)
    names = [modules[id(m)] for m in state.facts.layers.modules]
    pairs = [(k.detach().clone().requires_grad_(), v.detach().clone().requires_grad_()) for k, v in prefix.key_values()]
    fastprefix.detach(model)

    def oracle() -> list[Tensor]:
        if ROWS[name].cached:
            result = run_cached(model, pairs, batch, **positions(name, batch))
        else:
            result = run_concat(model, dict(zip(names, pairs, strict=True)), **batch, **positions(name, batch))
        want = output(model, result, batch)
        return [want, *gradients(want, [x for kv in pairs for x in kv])]

    eager = oracle()
    assert all(expected.abs().max() > 0 for expected in eager)
    with StayingInDouble():
        truth = oracle()
    assert_model_rule([got, *grads], eager, truth)


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.peft is None])
def test_equals_peft(name: str, padding: str) -> None:
    """The same numbers in PEFT's own prefix tuning, where it is right."""
    model, prefix = attached(name, torch.float32)
    batch = inputs(name, padding, torch.float32)
    got = output(model, model(**batch), batch)
    flat = gradients(got, list(prefix.parameters()))
    packed = [pack(x[0::2], x[1::2]) for x in (list(prefix.parameters()), flat)]
    fastprefix.detach(model)
    want, weight = run_peft(model, name, packed[0], batch)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    (theirs,) = gradients(want, [weight])
    torch.testing.assert_close(packed[1], theirs, rtol=1e-4, atol=1e-4 * max(1.0, theirs.abs().max().item()))


# What PEFT's forward says where a row's reason is that it fails; elsewhere its numbers are others.
FAILS = {
    STATES: "Cannot get conv state",
    TWO_DIMS: "Sizes of tensors must match",
    NO_CACHE: r"must match the size of tensor|unexpected keyword argument 'past_key_values'|^\w+Encoder\(",
}


@pytest.mark.parametrize("name", [n for n, row in ROWS.items() if row.peft is not None and row.content == "text"])
def test_where_peft_is_said_to_differ_it_does(name: str, tmp_path: Path) -> None:
    """It fails for the reason given; or it computes something else; or its tensor is none for these layers."""
    from peft import PrefixTuningConfig, get_peft_model

    row, batch = ROWS[name], inputs(name, "left", torch.float32)
    task = "CAUSAL_LM" if row.generates else "FEATURE_EXTRACTION"
    sizes = {"num_layers": 2, "token_dim": 32, "num_attention_heads": 4} if name == "distilbert" else {}
    peft = get_peft_model(row.build(), PrefixTuningConfig(task_type=task, num_virtual_tokens=P, **sizes)).eval()
    with torch.no_grad():
        peft.prompt_encoder.default.embedding.weight.normal_(std=0.6)
    extra = {k: x - P for k, x in positions(name, batch).items()} if row.causal else {}
    if row.peft in FAILS:
        with pytest.raises((RuntimeError, TypeError, ValueError), match=FAILS[row.peft]):
            peft(**batch, **extra)
        return
    want = output(peft, peft(**batch, **extra), batch)
    peft.save_pretrained(tmp_path)
    model = row.build()
    if name in ("gemma4", "falcon", "recurrent_gemma"):
        with pytest.raises(ValueError, match="prompt_embeddings: got shape"):
            fastprefix.load(model, tmp_path)
        return
    fastprefix.load(model, tmp_path)
    assert (output(model, model(**batch), batch) - want).abs().max() > 0.05


def run_peft(model: Any, name: str, embeddings: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Output of PEFT's prefix tuning, and its parameter. It needs position ids on padded rows, and moves them."""
    from peft import PrefixTuningConfig, get_peft_model

    task = "CAUSAL_LM" if ROWS[name].generates else "FEATURE_EXTRACTION"
    peft = get_peft_model(model, PrefixTuningConfig(task_type=task, num_virtual_tokens=P)).eval()
    weight = peft.prompt_encoder.default.embedding.weight
    with torch.no_grad():
        weight.copy_(embeddings)
    extra = {k: x - P for k, x in positions(name, batch).items()} if ROWS[name].causal else {}
    return output(model, peft(**batch, **extra), batch), weight


@pytest.mark.parametrize("name", GENERATES)
def test_generate_equals_a_forward_of_the_whole_text(name: str) -> None:
    """Greedy with a cache, left-padded: each new token is the argmax of a cache-less forward over all before it."""
    model, _ = attached(name, torch.float32)
    batch = inputs(name, "left")
    out = model.generate(**batch, max_new_tokens=6, do_sample=False, eos_token_id=None)
    mask = torch.cat([batch["attention_mask"], torch.ones(3, 6, dtype=torch.long)], 1)
    logits = model(input_ids=out, attention_mask=mask, use_cache=False).logits
    assert torch.equal(logits[:, S - 1 : -1].argmax(-1), out[:, S:])


# The MLP is the same for all: three architectures stand for it.
CHECKPOINTED = [(name, False, mode) for name, row in ROWS.items() for mode in row.modes]
CHECKPOINTED += [(name, True, mode) for name in ("llama_gqa", "gpt2", "bert") for mode in (True, False)]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "projected", "reentrant"), CHECKPOINTED)
def test_gradient_checkpointing(name: str, projected: bool, reentrant: bool) -> None:
    model, prefix = attached(name, prefix_projection=projected)
    batch = inputs(name, ROWS[name].paddings[-1])
    without_dropout(model)
    model.train()
    want = gradients(output(model, model(**batch, **no_cache(name)), batch), list(prefix.parameters()))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for parameter in prefix.parameters():
        parameter.grad = None
    x = output(model, model(**batch, **no_cache(name)), batch)
    (x * torch.sin(torch.arange(x.numel(), dtype=x.dtype)).view(x.shape)).sum().backward()
    for parameter, expected in zip(prefix.parameters(), want, strict=True):
        assert parameter.grad is not None and expected.abs().max() > 0
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.modes == (False,)])
def test_checkpointing_that_would_lose_gradients_is_refused(name: str) -> None:
    """Keys and values that layers share do not pass through the checkpointed layers' inputs."""
    model, _ = attached(name)
    model.train().gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match="use_reentrant: got True, expected False: layers of this model read another"):
        model(**inputs(name), use_cache=False)


def no_cache(name: str) -> dict[str, bool]:
    return {"use_cache": False} if ROWS[name].causal and ROWS[name].peft != NO_CACHE else {}


@pytest.mark.slow
@pytest.mark.parametrize("name", one_of_each_kind(ROWS))
def test_compiled(name: str) -> None:
    """Logits and gradients of a compiled model are those of the model."""
    torch._dynamo.reset()
    model, prefix = attached(name, torch.float32)
    batch = inputs(name, ROWS[name].paddings[-1], torch.float32)
    want = output(model, model(**batch, **no_cache(name)), batch)
    grads = gradients(want, list(prefix.parameters()))
    got = output(model, torch.compile(model, backend="eager")(**batch, **no_cache(name)), batch)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
    for grad, expected in zip(gradients(got, list(prefix.parameters())), grads, strict=True):
        torch.testing.assert_close(grad, expected, rtol=1e-3, atol=1e-3 * max(1.0, expected.abs().max().item()))


@pytest.mark.parametrize("name", ROWS)
@torch.no_grad()
def test_detached_is_bit_for_bit_what_it_was(name: str) -> None:
    model = ROWS[name].build()
    batch, config = inputs(name, ROWS[name].paddings[-1], torch.float32), model.config
    before = output(model, model(**batch), batch)
    model.requires_grad_(False)  # Jamba's states round otherwise then
    frozen = output(model, model(**batch), batch)
    model.requires_grad_(True)
    state = {n: id(x) for n, x in model.state_dict(keep_vars=True).items()}
    modules = [n for n, _ in model.named_modules()]
    fastprefix.attach(model, PrefixConfig(P))
    assert not torch.equal(output(model, model(**batch), batch), frozen)
    fastprefix.set_prefix(model, None)
    assert torch.equal(output(model, model(**batch), batch), frozen)
    fastprefix.detach(model)
    assert torch.equal(output(model, model(**batch), batch), before)
    assert model.config is config and [n for n, _ in model.named_modules()] == modules
    assert {n: id(x) for n, x in model.state_dict(keep_vars=True).items()} == state
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_carry_a_prefix_is_refused(name: str) -> None:
    model = REFUSED[name]().eval()
    config, implementation = model.config, model.config._attn_implementation
    with pytest.raises(ValueError, match=rf"model: got {type(model).__name__}, .*expected"):
        fastprefix.attach(model, PrefixConfig(P))
    assert model.config is config and model.config._attn_implementation == implementation
