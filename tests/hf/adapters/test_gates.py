"""``PrefixConfig(gate=...)``: two softmaxes and a trained gate, equal to the formula; a start that changes nothing."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastprefix
from fastprefix import PrefixConfig, PromptConfig, init
from fastprefix.hf.adapters.lookup import require_installation
from fastprefix.hf.explain import explain_model
from fastprefix.hf.trainer import restore
from tests.hf.adapters.added.same_results import assert_generation_equals_full_forwards, assert_rows_equal_separate_runs
from tests.model_zoo.architectures import ROWS, VOCAB
from tests.model_zoo.encoder_decoders import ROWS as ENCODER_DECODERS
from tests.model_zoo.encoder_decoders import batch, cast
from tests.support.concat_oracle import gated, run_added

IDS = torch.arange(3, 27).view(3, 8) % VOCAB
MODELS = ["llama_gqa", "gpt2", "phi", "bert"]


def opened(prefix: Any) -> Any:
    """The prefix in fp64 with gates that are not zero."""
    prefix.to(torch.float64)
    with torch.no_grad():
        for layer in prefix.layers:
            layer.gate.weight.normal_()
    return prefix


def attached(name: str, P: int = 5, label: str = "default", model: Any = None, **fields: Any) -> tuple[Any, Any]:
    model = ROWS[name].build(torch.float64) if model is None else model
    start = {} if fields.get("prefix_projection") else {"init": init.normal(0.5)}
    config = PrefixConfig(P, **{"gate": "tanh", **start, **fields})
    return model, opened(fastprefix.attach(model, config, label))


def terms(model: Any, prefix: Any, leaves: list[Tensor] | None = None) -> dict[str, Any]:
    """The formula, written out; ``leaves`` collects keys, values and weights of gates that require gradients."""
    modules = require_installation(model).facts.layers.modules
    names = {id(module): name for name, module in model.named_modules()}
    found = {}
    for index, (k, v), layer in zip(prefix.layer_indices, prefix.key_values(), prefix.layers, strict=True):
        own = [x.detach().clone().requires_grad_() for x in (k, v, layer.gate.weight)]
        gate = torch.tanh(own[2]) if prefix.config.gate == "tanh" else own[2]
        found[names[id(modules[index])]] = gated(own[0], own[1], gate.expand(prefix.num_heads[len(found)]))
        if leaves is not None:
            leaves += own
    return found


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("gate", ["tanh", "linear", "scalar"])
def test_equals_the_formula(name: str, gate: str) -> None:
    model, prefix = attached(name, gate=gate)
    mask = torch.ones_like(IDS)
    mask[1, :3] = 0
    leaves: list[Tensor] = []
    oracle = terms(model, prefix, leaves)
    got = model(input_ids=IDS, attention_mask=mask)[0][mask.bool()]
    weight = torch.sin(torch.arange(got.numel(), dtype=torch.float64)).view(got.shape)
    got.backward(weight)
    own = [p for layer in prefix.layers for p in (layer.k, layer.v, layer.gate.weight)]
    fastprefix.detach(model)
    positions = {} if name == "bert" else {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    want = run_added(model, oracle, input_ids=IDS, attention_mask=mask, **positions)[0][mask.bool()]
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    for parameter, grad in zip(own, torch.autograd.grad(want, leaves, weight), strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("projected", [False, True])
def test_attaching_changes_nothing_and_one_step_reaches_all_parameters(name: str, projected: bool) -> None:
    model = ROWS[name].build(torch.float64)
    bare = model(input_ids=IDS)[0]
    prefix = fastprefix.attach(model, PrefixConfig(5, gate="tanh", prefix_projection=projected)).to(torch.float64)
    got = model(input_ids=IDS)[0]
    torch.testing.assert_close(got, bare, rtol=1e-12, atol=1e-12)
    fastprefix.set_prefix(model, None)
    assert torch.equal(model(input_ids=IDS)[0], bare)
    fastprefix.set_prefix(model, "default")
    optimizer = torch.optim.SGD(prefix.parameters(), lr=0.1)
    gates = {id(layer.gate.weight) for layer in prefix.layers}
    for step in range(2):
        optimizer.zero_grad()
        model(input_ids=IDS)[0].square().sum().backward()
        for parameter in prefix.parameters():
            assert parameter.grad is not None
            assert bool(parameter.grad.any()) == (step == 1 or id(parameter) in gates)
        optimizer.step()
    assert [p for p in model.parameters() if p.requires_grad] and all(
        any(p is own for own in prefix.parameters()) for p in model.parameters() if p.requires_grad
    )


def test_generating_with_a_cache_equals_a_full_forward() -> None:
    model, _ = attached("llama_gqa")
    mask = torch.ones_like(IDS)
    mask[0, :2] = 0
    assert_generation_equals_full_forwards(model, IDS, mask)


def test_rows_read_their_own_prefixes_and_gates() -> None:
    model, a = attached("llama_gqa", 5, "a")
    _, b = attached("llama_gqa", 3, "b", model, layers=[1], gate="linear")
    assert_rows_equal_separate_runs(model, ["a", None, "b"], [a, b], IDS)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_step_is_the_same(reentrant: bool) -> None:
    model, prefix = attached("llama_gqa")
    model.train()
    model(input_ids=IDS)[0].square().sum().backward()
    want = [p.grad.clone() for p in prefix.parameters()]
    prefix.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    names = ["default", None, "default"]
    model(input_ids=IDS)[0].square().sum().backward()
    for parameter, grad in zip(prefix.parameters(), want, strict=True):
        torch.testing.assert_close(parameter.grad, grad)
    prefix.zero_grad()
    with fastprefix.prefix_batch(model, names):
        model(input_ids=IDS)[0].square().sum().backward()
    checkpointed = [p.grad.clone() for p in prefix.parameters()]
    prefix.zero_grad()
    model.gradient_checkpointing_disable()
    with fastprefix.prefix_batch(model, names):
        model(input_ids=IDS)[0].square().sum().backward()
    for parameter, grad in zip(prefix.parameters(), checkpointed, strict=True):
        torch.testing.assert_close(parameter.grad, grad)


@pytest.mark.parametrize("parts", [("encoder",), ("cross",), None])
def test_an_encoder_decoder_s_parts(parts: Any) -> None:
    model = ENCODER_DECODERS["t5"].build(torch.float64)
    inputs = cast(batch("t5", padded=False), torch.float64)
    bare = model(**inputs)[0]
    prefix = fastprefix.attach(model, PrefixConfig(4, gate="tanh", init=init.normal(0.5), parts=parts))
    torch.testing.assert_close(model(**inputs)[0], bare, rtol=1e-9, atol=1e-9)
    opened(prefix)
    oracle = terms(model, prefix)
    got = model(**inputs)[0]
    fastprefix.detach(model)
    torch.testing.assert_close(got, run_added(model, oracle, **inputs)[0], rtol=1e-9, atol=1e-9)
    assert not torch.allclose(got, bare)


@pytest.mark.parametrize("gate", ["tanh", "scalar"])
@pytest.mark.parametrize("projected", [False, True])
def test_saved_loaded_baked_and_copied(gate: str, projected: bool, tmp_path: Path) -> None:
    model, prefix = attached("llama_gqa", gate=gate, prefix_projection=projected, layers=[1])
    prefix.float()
    want = model(input_ids=IDS)[0]
    torch.testing.assert_close(copy.deepcopy(model)(input_ids=IDS)[0], want, rtol=0, atol=0)
    fastprefix.save(model, tmp_path)
    with torch.no_grad():
        for parameter in prefix.parameters():
            parameter.zero_()
    restore(prefix, tmp_path)
    torch.testing.assert_close(model(input_ids=IDS)[0], want, rtol=0, atol=0)
    fastprefix.detach(model)
    loaded: Any = fastprefix.load(model, tmp_path)
    assert loaded.config.gate == gate and loaded.config.position_offset == "none"
    torch.testing.assert_close(model(input_ids=IDS)[0], want, rtol=0, atol=0)
    assert (loaded.encoder is not None) == projected
    fastprefix.bake(model)
    torch.testing.assert_close(model(input_ids=IDS)[0], want)
    fastprefix.detach(model)
    fastprefix.register(model, {"disk": tmp_path})
    with fastprefix.prefix_batch(model, ["disk", "disk", "disk"]):
        torch.testing.assert_close(model(input_ids=IDS)[0], want)
    from peft import PeftModel

    fastprefix.detach(model)
    with pytest.raises((ValueError, KeyError), match="FASTPREFIX"):
        PeftModel.from_pretrained(model, str(tmp_path))


def test_gates_are_found_in_the_model() -> None:
    """By optimizers, and by what shards or counts a layer's parameters."""
    model, prefix = attached("llama_gqa")
    inside = {id(p) for name, p in model.named_parameters() if ".fastprefix.prefixes.default.gate." in name}
    assert inside == {id(layer.gate.weight) for layer in prefix.layers} and len(inside) == len(prefix.layers)
    assert isinstance(prefix.layers[0].gate, nn.Module)
    assert "gated prefix 'default': active, P=5" in explain_model(model)


def test_wrong_calls_are_refused() -> None:
    with pytest.raises(ValueError, match=r"gate: got 'sigmoid', expected one of \['tanh', 'linear', 'scalar'\]"):
        PrefixConfig(4, gate="sigmoid")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="position_offset: got 'after_prefix', expected 'none' with a gate"):
        PrefixConfig(4, gate="tanh", position_offset="after_prefix")
    assert PrefixConfig(4, gate="tanh").position_offset == "none" and PrefixConfig(4).position_offset == "after_prefix"


def test_what_cannot_be_read_with_a_gate_is_refused() -> None:
    model, prefix = attached("llama_gqa", 5, "gated")
    fastprefix.attach(model, PrefixConfig(2), "plain").to(torch.float64)
    fastprefix.attach(model, PromptConfig(2), "prompt").to(torch.float64)
    for other in ("plain", "prompt"):
        with (
            fastprefix.prefix_batch(model, ["gated", other, None]),
            pytest.raises(ValueError, match=f"names: got 'gated', a gated prefix and '{other}', a"),
        ):
            model(input_ids=IDS)
    with (
        pytest.raises(ValueError, match=r"names: got \('gated', 'plain'\) with a gated prefix"),
        fastprefix.prefix_batch(model, [("gated", "plain")]),
    ):
        model(input_ids=IDS)
    fastprefix.set_prefix(model, "gated")
    with (
        fastprefix.shared_prompt(model, [5, 6]),
        pytest.raises(ValueError, match="prefix: got a gated prefix beside a shared prompt"),
    ):
        model(input_ids=IDS)
    with pytest.raises(ValueError, match="prefix: got a gated prefix beside a shared prompt"):
        fastprefix.completion_logprobs(model, [[5, 6]], IDS)
    with pytest.raises(ValueError, match="prefixes: got a gated prefix, expected prefixes of keys and values"):
        init.concat(prefix, prefix)
