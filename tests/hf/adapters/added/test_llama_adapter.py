"""LLaMA-Adapter: equal to its formula and to PEFT's ADAPTION_PROMPT; how layers project is found by running them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastprefix
from fastprefix import LlamaAdapterConfig, init
from fastprefix.hf.adapters.lookup import require_installation
from fastprefix.hf.trainer import restore
from tests.hf.adapters.added.same_results import (
    assert_checkpointed_step_is_the_same,
    assert_generation_equals_full_forwards,
    assert_rows_equal_separate_runs,
)
from tests.model_zoo.architectures import ROWS, VOCAB
from tests.model_zoo.encoder_decoders import ROWS as ENCODER_DECODERS
from tests.support.concat_oracle import gated, run_added

IDS = torch.arange(3, 27).view(3, 8) % VOCAB


def opened(adapter: Any) -> Any:
    adapter.to(torch.float64)
    with torch.no_grad():
        for layer in adapter.layers:
            layer.gate.weight.normal_()
    return adapter


def attached(name: str = "llama_gqa", P: int = 5, label: str = "default", model: Any = None, **fields: Any) -> Any:
    model = ROWS[name].build(torch.float64) if model is None else model
    return model, opened(fastprefix.attach(model, LlamaAdapterConfig(P, **fields), label))


def heads(x: Tensor, dim: int) -> Tensor:
    return x.unflatten(-1, (-1, dim)).transpose(0, 1)


def llama(module: Any, prompt: Tensor) -> tuple[Tensor, Tensor]:
    return heads(module.k_proj(prompt), module.head_dim), heads(module.v_proj(prompt), module.head_dim)


def qwen3(module: Any, prompt: Tensor) -> tuple[Tensor, Tensor]:
    k, v = heads(module.k_proj(prompt), module.head_dim), heads(module.v_proj(prompt), module.head_dim)
    return module.k_norm(k), v


def gpt2(module: Any, prompt: Tensor) -> tuple[Tensor, Tensor]:
    _, k, v = module.c_attn(prompt).chunk(3, dim=-1)
    return heads(k, module.head_dim), heads(v, module.head_dim)


def bert(module: Any, prompt: Tensor) -> tuple[Tensor, Tensor]:
    dim = module.attention_head_size
    return heads(module.key(prompt), dim), heads(module.value(prompt), dim)


# Written out per architecture, as an independent truth for what is found by running.
FORMULAS = {"llama_gqa": llama, "mistral_window": llama, "qwen3": qwen3, "gpt2": gpt2, "bert": bert}


@pytest.mark.parametrize("gate", ["tanh", "scalar"])
@pytest.mark.parametrize("name", FORMULAS)
def test_equals_the_formula(name: str, gate: str) -> None:
    model, adapter = attached(name, gate=gate, num_layers=1)
    (layer,) = adapter.layers
    modules = require_installation(model).facts.layers.modules
    assert adapter.layer_indices == (len(modules) - 1,)
    prompt, weight = (x.detach().clone().requires_grad_() for x in (layer.prompt, layer.gate.weight))
    k, v = FORMULAS[name](modules[-1], prompt)
    factor = torch.tanh(weight) if gate == "tanh" else weight
    path = next(path for path, module in model.named_modules() if module is modules[-1])
    oracle = {path: gated(k, v, factor.expand(adapter.num_heads[0]))}
    got = model(input_ids=IDS)[0]
    along = torch.sin(torch.arange(got.numel(), dtype=torch.float64)).view(got.shape)
    got.backward(along)
    own = layer.prompt.grad, layer.gate.weight.grad
    fastprefix.detach(model)
    want = run_added(model, oracle, input_ids=IDS)[0]
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    for mine, grad in zip(own, torch.autograd.grad(want, (prompt, weight), along), strict=True):
        torch.testing.assert_close(mine, grad, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", ["phi", "phi3", "gpt_neox", "cohere", "olmo2", "gemma3"])
def test_projections_are_found_and_zero_gates_change_nothing(name: str) -> None:
    model = ROWS[name].build(torch.float64)
    bare = model(input_ids=IDS)[0]
    adapter = fastprefix.attach(model, LlamaAdapterConfig(4)).to(torch.float64)
    torch.testing.assert_close(model(input_ids=IDS)[0], bare, rtol=1e-9, atol=1e-9)
    opened(adapter)
    assert not torch.allclose(model(input_ids=IDS)[0], bare)


def test_only_gates_get_gradients_first_and_then_everything() -> None:
    model = ROWS["llama_gqa"].build(torch.float64)
    adapter = fastprefix.attach(model, LlamaAdapterConfig(5)).to(torch.float64)
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    gates = {id(layer.gate.weight) for layer in adapter.layers}
    for step in range(2):
        optimizer.zero_grad()
        model(input_ids=IDS)[0].square().sum().backward()
        for parameter in adapter.parameters():
            assert bool(parameter.grad.any()) == (step == 1 or id(parameter) in gates)
        optimizer.step()
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == sum(p.numel() for p in adapter.parameters())


@pytest.mark.parametrize("name", ["llama_gqa", "mistral_window"])
def test_equals_peft_and_its_files_go_both_ways(name: str, tmp_path: Path) -> None:
    import peft

    base = ROWS[name].build(torch.float64)
    config = peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=5, adapter_layers=1)
    theirs: Any = peft.get_peft_model(copy.deepcopy(base), config).double().eval()
    with torch.no_grad():
        for path, parameter in theirs.named_parameters():
            if path.endswith("adaption_gate"):
                parameter.fill_(0.7)
    want = theirs(input_ids=IDS).logits
    theirs.save_pretrained(tmp_path / "theirs")
    adapter: Any = fastprefix.load(base, tmp_path / "theirs")
    fastprefix.set_prefix(base, None)
    assert not torch.allclose(base(input_ids=IDS).logits, want, rtol=1e-2, atol=1e-2)
    fastprefix.set_prefix(base, "default")
    assert adapter.config.gate == "scalar" and adapter.num_virtual_tokens == 5 and len(adapter.layers) == 1
    adapter.to(torch.float64)
    # PEFT takes the softmax in fp32, whatever the model's dtype.
    torch.testing.assert_close(base(input_ids=IDS).logits, want, rtol=1e-4, atol=1e-5)
    fastprefix.save(base, tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "adapter_config.json").read_text())["peft_type"] == "ADAPTION_PROMPT"
    fastprefix.detach(base)
    back = peft.PeftModel.from_pretrained(base, str(tmp_path / "ours")).double().eval()
    torch.testing.assert_close(back(input_ids=IDS).logits, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gate", ["tanh", "scalar"])
def test_saved_loaded_restored_and_copied(gate: str, tmp_path: Path) -> None:
    model, adapter = attached(gate=gate, num_layers=1)
    adapter.float()
    want = model(input_ids=IDS)[0]
    torch.testing.assert_close(copy.deepcopy(model)(input_ids=IDS)[0], want, rtol=0, atol=0)
    fastprefix.save(model, tmp_path)
    kind = json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"]
    assert kind == ("ADAPTION_PROMPT" if gate == "scalar" else "FASTPREFIX")
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.zero_()
    restore(adapter, tmp_path)
    torch.testing.assert_close(model(input_ids=IDS)[0], want, rtol=0, atol=0)
    fastprefix.bake(model)  # nothing to bake
    fastprefix.detach(model)
    loaded: Any = fastprefix.load(model, tmp_path)
    assert loaded.config == LlamaAdapterConfig(5, 1, gate=gate)  # type: ignore[arg-type]
    torch.testing.assert_close(model(input_ids=IDS)[0], want, rtol=0, atol=0)
    fastprefix.detach(model)
    fastprefix.register(model, {"disk": tmp_path})
    with fastprefix.prefix_batch(model, ["disk", "disk", "disk"]):
        torch.testing.assert_close(model(input_ids=IDS)[0], want)


def test_rows_read_their_own_adapters_and_gated_prefixes() -> None:
    model, a = attached(label="a")
    _, b = attached(P=3, label="b", model=model, gate="linear", num_layers=1)
    c = fastprefix.attach(model, fastprefix.PrefixConfig(4, gate="tanh", init=init.normal(0.5)), "c")
    opened(c)
    assert_rows_equal_separate_runs(model, ["a", "b", "c"], [a, b, c], IDS)


def test_generating_with_a_cache_equals_a_full_forward() -> None:
    model, _ = attached()
    mask = torch.ones_like(IDS)
    mask[0, :2] = 0
    assert_generation_equals_full_forwards(model, IDS, mask)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_step_is_the_same(reentrant: bool) -> None:
    model, adapter = attached()
    assert_checkpointed_step_is_the_same(model, adapter, IDS, reentrant)


@pytest.mark.slow
def test_compiled() -> None:
    torch._dynamo.reset()
    model, _ = attached()
    want = model(input_ids=IDS)[0]
    torch.testing.assert_close(torch.compile(model, backend="aot_eager")(input_ids=IDS)[0], want)


def test_wrong_calls_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="num_layers: got 0, expected an int of at least 1"):
        LlamaAdapterConfig(num_layers=0)
    with pytest.raises(ValueError, match="gate: got None, expected one of"):
        LlamaAdapterConfig(gate=None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"init: got 'vocabulary', expected what fastprefix\.init\.normal returns"):
        LlamaAdapterConfig(init=init.vocabulary())
    model = ROWS["llama_gqa"].build()
    with pytest.raises(ValueError, match=r"num_layers: got 99, expected at most \d+, the model's attention layers"):
        fastprefix.attach(model, LlamaAdapterConfig(num_layers=99))
    with pytest.raises(ValueError, match="model: got an encoder-decoder, expected a model of one stack"):
        fastprefix.attach(ENCODER_DECODERS["t5"].build(), LlamaAdapterConfig())
    with pytest.raises(ValueError, match="which runs one module as several layers"):
        fastprefix.attach(ROWS["albert"].build(), LlamaAdapterConfig())
    import peft

    config = peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=5, adapter_layers=1)
    peft.get_peft_model(ROWS["gpt2"].build(), config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"peft_type: got ADAPTION_PROMPT \(PEFT does not add its prompts to GPT2"):
        fastprefix.load(ROWS["gpt2"].build(), tmp_path)


def test_keys_that_depend_on_a_token_s_place_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ROWS["llama_gqa"].build()
    module = model.model.layers[-1].self_attn
    original = type(module).forward

    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        places = torch.arange(hidden_states.shape[1], dtype=hidden_states.dtype)[:, None]
        return original(self, hidden_states + places, *args, **kwargs)

    monkeypatch.setattr(type(module), "forward", forward)
    with pytest.raises(ValueError, match="model: got LlamaForCausalLM, whose LlamaAttention makes them otherwise"):
        fastprefix.attach(model, LlamaAdapterConfig())
