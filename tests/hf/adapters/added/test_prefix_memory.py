"""``PrefixMemoryConfig``: ``o_content + elu(q)^T M``, equal to the formula, from a start that changes nothing."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastprefix
from fastprefix import PrefixMemoryConfig
from fastprefix.hf.adapters.lookup import require_installation
from fastprefix.hf.trainer import restore
from fastprefix.prefixes.memory import add_memory
from tests.hf.adapters.added.same_results import (
    assert_checkpointed_step_is_the_same,
    assert_generation_equals_full_forwards,
)
from tests.model_zoo.architectures import ROWS, VOCAB
from tests.model_zoo.encoder_decoders import ROWS as ENCODER_DECODERS
from tests.model_zoo.encoder_decoders import batch, cast
from tests.support.concat_oracle import Term, run_added

IDS = torch.arange(3, 27).view(3, 8) % VOCAB


def attached(name: str = "llama_gqa", model: Any = None, **fields: Any) -> tuple[Any, Any]:
    model = ROWS[name].build(torch.float64) if model is None else model
    memory = fastprefix.attach(model, PrefixMemoryConfig(**fields)).to(torch.float64)
    with torch.no_grad():
        for layer in memory.layers:
            layer.memory.normal_(std=0.3)
    return model, memory


def term(memory: Tensor) -> Term:
    """Written out: elu is q above zero and e^q - 1 below."""
    return lambda q, scale: torch.einsum("bhsd,hdv->bhsv", torch.where(q > 0, q, torch.expm1(q)), memory)


def terms(model: Any, memory: Any) -> tuple[dict[str, Term], list[Tensor]]:
    names = {id(module): name for name, module in model.named_modules()}
    modules = require_installation(model).facts.layers.modules
    leaves = [layer.memory.detach().clone().requires_grad_() for layer in memory.layers]
    found = zip(memory.layer_indices, leaves, strict=True)
    return {names[id(modules[i])]: term(leaf) for i, leaf in found}, leaves


@pytest.mark.parametrize("name", ["llama_gqa", "gpt2"])
def test_equals_the_formula(name: str) -> None:
    model, memory = attached(name)
    mask = torch.ones_like(IDS)
    mask[1, :3] = 0
    oracle, leaves = terms(model, memory)
    got = model(input_ids=IDS, attention_mask=mask)[0][mask.bool()]
    along = torch.sin(torch.arange(got.numel(), dtype=torch.float64)).view(got.shape)
    got.backward(along)
    fastprefix.detach(model)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    want = run_added(model, oracle, input_ids=IDS, attention_mask=mask, position_ids=positions)[0][mask.bool()]
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    for layer, grad in zip(memory.layers, torch.autograd.grad(want, leaves, along), strict=True):
        torch.testing.assert_close(layer.memory.grad, grad, rtol=1e-8, atol=1e-9)


def test_the_gradient_of_the_term() -> None:
    inputs = [
        torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 4, 3, 6), (2, 4, 3, 5), (4, 5, 6))
    ]
    assert torch.autograd.gradcheck(add_memory, inputs)


@pytest.mark.parametrize("parts", [("cross",), None])
def test_an_encoder_decoder_s_parts(parts: Any) -> None:
    model, memory = attached(model=ENCODER_DECODERS["t5"].build(torch.float64), parts=parts)
    inputs = cast(batch("t5", padded=False), torch.float64)
    oracle, _ = terms(model, memory)
    got = model(**inputs)[0]
    fastprefix.detach(model)
    torch.testing.assert_close(got, run_added(model, oracle, **inputs)[0], rtol=1e-9, atol=1e-9)


def test_it_starts_at_the_model_s_own_outputs_and_all_of_it_trains() -> None:
    model = ROWS["llama_gqa"].build(torch.float64)
    bare = model(input_ids=IDS)[0]
    memory = fastprefix.attach(model, PrefixMemoryConfig()).to(torch.float64)
    got = model(input_ids=IDS)[0]
    torch.testing.assert_close(got, bare, rtol=1e-12, atol=1e-12)
    got.square().sum().backward()
    assert all(bool((layer.memory.grad != 0).all()) for layer in memory.layers)


def test_generating_with_a_cache_equals_a_full_forward() -> None:
    model, _ = attached()
    mask = torch.ones_like(IDS)
    mask[0, :2] = 0
    assert_generation_equals_full_forwards(model, IDS, mask)


def test_saved_loaded_restored_and_copied(tmp_path: Path) -> None:
    model, memory = attached(layers=[1])
    memory.float()
    want = model(input_ids=IDS)[0]
    torch.testing.assert_close(copy.deepcopy(model)(input_ids=IDS)[0], want, rtol=0, atol=0)
    fastprefix.save(model, tmp_path)
    with torch.no_grad():
        memory.layers[0].memory.zero_()
    restore(memory, tmp_path)
    torch.testing.assert_close(model(input_ids=IDS)[0], want, rtol=0, atol=0)
    fastprefix.detach(model)
    loaded: Any = fastprefix.load(model, tmp_path)
    assert loaded.config == PrefixMemoryConfig(layers=[1])
    torch.testing.assert_close(model(input_ids=IDS)[0], want, rtol=0, atol=0)
    fastprefix.set_prefix(model, None)
    with fastprefix.prefix_batch(model, ["default", "default", "default"]):
        torch.testing.assert_close(model(input_ids=IDS)[0], want)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_step_is_the_same(reentrant: bool) -> None:
    model, memory = attached()
    assert_checkpointed_step_is_the_same(model, memory, IDS, reentrant)


def test_mixed_batches_and_shared_prompts_are_refused() -> None:
    model, _ = attached()
    fastprefix.attach(model, fastprefix.PrefixConfig(2), "plain").to(torch.float64)
    fastprefix.attach(model, PrefixMemoryConfig(), "other").to(torch.float64)
    for names, match in (
        (["default", None, None], "names: got a prefix memory in a mixed batch, expected one memory for all rows"),
        (["default", "other", None], "names: got a prefix memory in a mixed batch"),
        (["default", "plain", None], "names: got 'default', a prefix memory and 'plain', a prefix"),
    ):
        with fastprefix.prefix_batch(model, names), pytest.raises(ValueError, match=match):
            model(input_ids=IDS)
    fastprefix.set_prefix(model, "default")
    with (
        fastprefix.shared_prompt(model, [5, 6]),
        pytest.raises(ValueError, match="prefix: got a prefix memory beside a shared prompt"),
    ):
        model(input_ids=IDS)
    with pytest.raises(ValueError, match="layers: got"):
        PrefixMemoryConfig(layers=[])
