"""``PrefixConfig(prefix_bias=True)``: a trained bias on the scores of prefix tokens, by explicit concatenation."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastprefix
from fastprefix import PrefixConfig, init
from fastprefix.hf.adapters.lookup import require_installation
from fastprefix.hf.trainer import restore
from tests.hf.adapters.added.same_results import assert_generation_equals_full_forwards
from tests.model_zoo.architectures import ROWS, VOCAB
from tests.support.concat_oracle import run_concat

IDS = torch.arange(3, 27).view(3, 8) % VOCAB
P = 5


def attached(name: str = "llama_gqa", label: str = "default", model: Any = None, **fields: Any) -> tuple[Any, Any]:
    model = ROWS[name].build(torch.float64) if model is None else model
    start = {} if fields.get("prefix_projection") else {"init": init.normal(0.5)}
    config = PrefixConfig(**{"num_virtual_tokens": P, "prefix_bias": True, **start, **fields})
    prefix = fastprefix.attach(model, config, label).to(torch.float64)
    with torch.no_grad():
        for layer in prefix.layers:
            if layer.bias is not None:
                layer.bias.normal_().mul_(2.0)
    return model, prefix


def written_out(model: Any, prefix: Any) -> tuple[dict[str, tuple[Tensor, ...]], list[Tensor]]:
    """Keys, values and biases of attention modules by name, and all of them as leaves."""
    modules = require_installation(model).facts.layers.modules
    names = {id(module): name for name, module in model.named_modules()}
    found, leaves = {}, []
    for index, (k, v), layer in zip(prefix.layer_indices, prefix.key_values(), prefix.layers, strict=True):
        own = tuple(x.detach().clone().requires_grad_() for x in (k, v, layer.bias))
        found[names[id(modules[index])]] = own
        leaves += own
    return found, leaves


@pytest.mark.parametrize("name", ["llama_gqa", "gpt2", "bert", "mistral_window"])
def test_equals_concatenation(name: str) -> None:
    model, prefix = attached(name)
    mask = torch.ones_like(IDS)
    mask[1, :3] = 0
    given, leaves = written_out(model, prefix)
    got = model(input_ids=IDS, attention_mask=mask)[0][mask.bool()]
    weight = torch.sin(torch.arange(got.numel(), dtype=torch.float64)).view(got.shape)
    got.backward(weight)
    own = [p for layer in prefix.layers for p in (layer.k, layer.v, layer.bias)]
    fastprefix.detach(model)
    positions = {"position_ids": P + (mask.cumsum(1) - 1).clamp(min=0)}
    if name == "bert":
        positions = {"position_ids": P + torch.arange(8).expand(3, -1)}
    want = run_concat(model, given, input_ids=IDS, attention_mask=mask, **positions)[0][mask.bool()]
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    for parameter, grad in zip(own, torch.autograd.grad(want, leaves, weight), strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-8, atol=1e-9)


def test_it_starts_at_zero_and_is_trained_with_a_gate_an_mlp_or_frozen_tokens() -> None:
    for fields in ({"gate": "tanh"}, {"prefix_projection": True}, {"num_frozen_tokens": 2}, {"dropout": 0.5}):
        model = ROWS["llama_gqa"].build(torch.float64)
        prefix = fastprefix.attach(model, PrefixConfig(P, prefix_bias=True, **fields)).to(torch.float64)  # type: ignore[arg-type]
        assert all(layer.bias.shape == (2, P) and not layer.bias.any() for layer in prefix.layers)
        if "gate" in fields:
            torch.nn.init.ones_(prefix.layers[0].gate.weight)
        prefix.train()
        model(input_ids=IDS)[0].square().sum().backward()
        assert prefix.layers[0].bias.grad.any(), fields


def test_rows_read_their_own_biases_alone_and_behind_each_other() -> None:
    model, _ = attached(label="a")
    attached(label="b", model=model, num_virtual_tokens=3, layers=[1])
    attached(label="c", model=model, num_virtual_tokens=2, prefix_bias=False)
    names: list[Any] = ["a", "c", "b"]
    want = []
    for row, name in enumerate(names):
        fastprefix.set_prefix(model, name)
        want.append(model(input_ids=IDS[row : row + 1])[0])
    with fastprefix.prefix_batch(model, names):
        torch.testing.assert_close(model(input_ids=IDS)[0], torch.cat(want), rtol=1e-9, atol=1e-9)
    together = init.concat(*(require_installation(model).selection.named(name) for name in ("a", "c")))
    joined = fastprefix.attach(model, PrefixConfig(init=together, prefix_bias=True), "joined").to(torch.float64)
    assert torch.equal(joined.biases()[0][:, P:], torch.zeros(2, 2, dtype=torch.float64))
    fastprefix.set_prefix(model, "joined")
    expected = model(input_ids=IDS)[0]
    with fastprefix.prefix_batch(model, [("a", "c")] * 3):
        got = model(input_ids=IDS)[0]
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)  # a start is kept in fp32


def test_generating_with_a_cache_equals_a_full_forward() -> None:
    model, _ = attached()
    assert_generation_equals_full_forwards(model, IDS, torch.ones_like(IDS))


@pytest.mark.parametrize("projected", [False, True])
def test_saved_loaded_restored_copied_and_baked(projected: bool, tmp_path: Path) -> None:
    model, prefix = attached(prefix_projection=projected)
    want = model(input_ids=IDS)[0]
    fastprefix.save(model, tmp_path)
    assert '"peft_type": "FASTPREFIX"' in (tmp_path / "adapter_config.json").read_text()
    torch.testing.assert_close(copy.deepcopy(model)(input_ids=IDS)[0], want, rtol=0, atol=0)
    with torch.no_grad():
        prefix.layers[0].bias.zero_()
    assert not torch.equal(model(input_ids=IDS)[0], want)
    restore(prefix, tmp_path)
    torch.testing.assert_close(model(input_ids=IDS)[0], want, rtol=1e-12, atol=1e-12)
    fastprefix.bake(model)
    torch.testing.assert_close(model(input_ids=IDS)[0], want, rtol=1e-5, atol=1e-5)
    fastprefix.detach(model)
    loaded = fastprefix.load(model, tmp_path).to(torch.float64)
    assert loaded.config.prefix_bias and loaded.layers[0].bias.requires_grad
    torch.testing.assert_close(model(input_ids=IDS)[0], want, rtol=1e-5, atol=1e-5)
    fastprefix.detach(model)
    other = fastprefix.attach(model, PrefixConfig(P, prefix_projection=projected))
    with pytest.raises(ValueError, match="prefix_bias: got True, expected None, the attached prefix's"):
        restore(other, tmp_path)


def test_a_start_with_biases() -> None:
    model = ROWS["llama_gqa"].build(torch.float32)
    shapes = require_installation(fastprefix_attached(model)).facts.layers.shapes
    keys = [torch.randn(s.num_kv_heads, 3, s.head_dim) for s in shapes]
    biases = [torch.randn(s.num_kv_heads, 3) for s in shapes]
    prefix = fastprefix.attach(model, PrefixConfig(init=init.kv(keys, keys, biases), prefix_bias=True), "b")
    assert all(torch.equal(layer.bias, b) for layer, b in zip(prefix.layers, biases, strict=True))
    one = PrefixConfig(init=init.kv(keys, keys, biases), prefix_bias=True, layers=[1])
    assert torch.equal(fastprefix.attach(model, one, "c").layers[0].bias, biases[1])
    for sliced in (init.slice(prefix, 1), init.drop(prefix, [0])):
        assert sliced.biases is not None and torch.equal(sliced.biases[0], biases[0][:, 1:])


def fastprefix_attached(model: Any) -> Any:
    fastprefix.attach(model, PrefixConfig(2), "other")
    return model


def test_wrong_calls() -> None:
    keys = [torch.randn(2, 3, 8)] * 2
    with pytest.raises(ValueError, match="prefix_bias: got 1, expected True or False"):
        PrefixConfig(3, prefix_bias=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="prefix_bias: got False, expected True for an init with biases"):
        PrefixConfig(init=init.kv(keys, keys, [torch.zeros(2, 3)] * 2))
    for biases in ([torch.zeros(2, 4)] * 2, [torch.zeros(2, 3)], [torch.zeros(2, 3)] * 3, [1, 2]):
        with pytest.raises(ValueError, match=r"biases: got .*, expected a tensor \[H_kv, P\] for each layer's keys"):
            init.kv(keys, keys, biases)  # type: ignore[arg-type]
