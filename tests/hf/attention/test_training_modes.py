"""Training a prefix under what trainers do to a model: equal losses, equal gradients, nothing else trained."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastprefix
from fastprefix import PrefixConfig
from fastprefix.prefixes.prefix import Prefix
from tests.model_zoo.architectures import ROWS, VOCAB

P, S = 5, 9
MODELS = ["llama_gqa", "gpt2", "gemma2", "bert"]


def attached(name: str, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Any, Prefix]:
    model = ROWS[name].build(dtype)
    prefix = fastprefix.attach(model, PrefixConfig(P, init=fastprefix.init.normal(0.6), **options))
    return model, prefix


def loss(model: Any, **inputs: Any) -> Tensor:
    out = model(**inputs)
    x = out.logits if hasattr(out, "logits") else out.last_hidden_state
    return torch.log_softmax(x.float(), -1)[..., 7].mean()


def test_only_the_prefix_is_trained() -> None:
    model, prefix = attached("llama_gqa")
    trained = {id(p) for p in prefix.parameters()}
    assert {id(p) for p in model.parameters() if p.requires_grad} == trained
    assert sum(p.numel() for p in prefix.parameters()) == 2 * 2 * 2 * P * 8
    model.train()
    optimizer = torch.optim.AdamW(prefix.parameters(), lr=0.05)
    ids = torch.randint(3, VOCAB, (4, S))
    before = {n: x.clone() for n, x in model.state_dict().items()}
    losses = []
    for _ in range(10):
        value = torch.nn.functional.cross_entropy(
            model(input_ids=ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
        )
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert losses[-1] < losses[0] - 0.05
    changed = {n for n, x in model.state_dict().items() if not torch.equal(x, before[n])}
    assert changed == {n for n in before if ".fastprefix." in n}


# The MLP in front of a prefix is the same for all: one model stands for it.
PROJECTED = [pytest.param(name, True, marks=() if name == MODELS[0] else pytest.mark.exhaustive) for name in MODELS]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "projected"), [*((name, False) for name in MODELS), *PROJECTED])
def test_compile_equals_eager(name: str, projected: bool) -> None:
    torch._dynamo.reset()
    model, prefix = attached(name, prefix_projection=projected)
    ids = torch.randint(3, VOCAB, (2, S))
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    want = loss(model, input_ids=ids, attention_mask=mask)
    grads = torch.autograd.grad(want, list(prefix.parameters()))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    got = loss(compiled, input_ids=ids, attention_mask=mask)
    torch.testing.assert_close(got, want)
    for grad, expected in zip(torch.autograd.grad(got, list(prefix.parameters())), grads, strict=True):
        torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_a_compiled_model_follows_the_parameters_and_set_prefix() -> None:
    torch._dynamo.reset()
    model, prefix = attached("llama_gqa")
    ids = torch.randint(3, VOCAB, (2, S))
    compiled = torch.compile(model, backend="aot_eager")
    first = compiled(input_ids=ids).logits
    with torch.no_grad():
        for parameter in prefix.parameters():
            parameter.mul_(2.0)
    second = compiled(input_ids=ids).logits
    torch.testing.assert_close(second, model(input_ids=ids).logits)
    assert not torch.allclose(first, second)
    fastprefix.set_prefix(model, None)
    torch.testing.assert_close(compiled(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize("name", MODELS)
def test_bf16_autocast_and_bf16_model(name: str) -> None:
    model, prefix = attached(name)
    ids = torch.randint(3, VOCAB, (2, S))
    want = loss(model, input_ids=ids)
    with torch.autocast("cpu", torch.bfloat16):
        got = loss(model, input_ids=ids)
    torch.testing.assert_close(got, want, rtol=3e-2, atol=3e-2)
    got.backward()
    for parameter in prefix.parameters():
        assert parameter.grad is not None and parameter.grad.dtype == torch.float32 and parameter.grad.abs().max() > 0
    model, prefix = attached(name, torch.bfloat16)
    value = loss(model, input_ids=ids)
    torch.testing.assert_close(value, want, rtol=3e-2, atol=3e-2)
    value.backward()
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in prefix.parameters() if p.grad is not None)


@pytest.mark.parametrize("use_cache", [None, True, False])
@pytest.mark.parametrize("name", ["llama_gqa", "mistral_window", "gemma3", "gpt2"])
def test_packed_documents_equal_separate_ones(name: str, use_cache: bool | None) -> None:
    model, prefix = attached(name, torch.float64)
    prefix.double()
    lengths = (4, 6, 2)
    documents = [torch.randint(3, VOCAB, (1, n)) for n in lengths]
    want = torch.cat([model(input_ids=d).logits for d in documents], 1)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    extra = {} if use_cache is None else {"use_cache": use_cache}
    got = model(input_ids=torch.cat(documents, 1), position_ids=positions, **extra).logits
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    parameters = list(prefix.parameters())
    for a, b in zip(
        torch.autograd.grad(got.sin().sum(), parameters), torch.autograd.grad(want.sin().sum(), parameters), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["llama_gqa", "bert"])
def test_inputs_embeds_under_reentrant_checkpointing(name: str) -> None:
    model, prefix = attached(name, torch.float64)
    ids = torch.randint(3, VOCAB, (2, S))
    want = torch.autograd.grad(loss(model, input_ids=ids), list(prefix.parameters()))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    loss(model, inputs_embeds=model.get_input_embeddings()(ids).detach()).backward()
    for parameter, expected in zip(prefix.parameters(), want, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-5, atol=1e-7)


def test_dropout_of_the_frozen_model_is_honoured() -> None:
    model, _ = attached("gpt2")
    assert model.config.attn_pdrop > 0
    ids = torch.randint(3, VOCAB, (1, S))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for module in model.modules():
        if hasattr(module, "attn_dropout"):
            module.attn_dropout.p = 0.5
    calm = model(input_ids=ids).logits
    model.train()
    torch.manual_seed(0)
    first = model(input_ids=ids).logits
    torch.manual_seed(0)
    assert torch.equal(model(input_ids=ids).logits, first)
    assert not torch.allclose(first, calm)


def test_saved_bytes_do_not_grow_with_the_prefix_or_the_batch_times_prefix() -> None:
    extra = {}
    for B in (1, 8):
        counts = {}
        for P_ in (1, 65):
            model = ROWS["llama_gqa"].build()
            fastprefix.attach(model, PrefixConfig(P_))
            own = {x.untyped_storage().data_ptr() for x in model.parameters()}
            seen: dict[int, int] = {}

            def pack(x: Tensor, own: set[int] = own, seen: dict[int, int] = seen) -> Tensor:
                storage = x.untyped_storage()
                if storage.data_ptr() not in own:
                    seen[storage.data_ptr()] = storage.nbytes()
                return x

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
                out = loss(model, input_ids=torch.randint(3, VOCAB, (B, S)))
            assert out.requires_grad
            counts[P_] = sum(seen.values())
        extra[B] = counts[65] - counts[1]
    assert extra == {1: 0, 8: 0}


def test_packing_where_the_model_cannot_is_refused() -> None:
    model, _ = attached("opt")
    ids, positions = torch.randint(3, VOCAB, (1, 6)), torch.tensor([[0, 1, 2, 0, 1, 2]])
    with pytest.raises(ValueError, match="position_ids: got packed documents"):
        model(input_ids=ids, position_ids=positions)
    model(input_ids=ids, position_ids=torch.arange(6)[None])
