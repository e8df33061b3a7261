"""Layers that are not one attention module each: hybrids, one module that runs as several, methods led to ours."""

from __future__ import annotations

import copy
import pickle
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers

import fastprefix
from fastprefix import PrefixConfig, PromptConfig
from fastprefix.hf.adapters.lookup import find_installation, require_installation
from fastprefix.hf.attention.method_overrides import MethodOverride, find_overrides
from tests.model_zoo import hybrids
from tests.model_zoo.architectures import ROWS
from tests.model_zoo.inputs import P, S, inputs

START = fastprefix.init.normal(0.6)
LED = [name for name, row in ROWS.items() if row.cached]
# How many of a hybrid's layers have attention, by the configs of the table.
ATTENTION = dict.fromkeys(hybrids.ROWS, 1) | {"jamba": 2, "zamba": 2, "zamba2": 2, "falcon_h1": 2}


def layers_of(line: str) -> int:
    """How many layers a line of ``explain`` is about: ``layers 0-1, 3, model...``."""
    numbers = re.match(r"layers? ([\d, -]+), ", line)
    assert numbers
    runs = [[int(x) for x in run.split("-")] for run in numbers[1].split(", ")]
    return sum(run[-1] - run[0] + 1 for run in runs)


@pytest.mark.parametrize("name", hybrids.ROWS)
def test_a_hybrid_says_which_layers_have_a_prefix(name: str) -> None:
    model = ROWS[name].build()
    prefix = fastprefix.attach(model, PrefixConfig(P, init=START))
    assert len(prefix.layers) == ATTENTION[name]
    text = fastprefix.explain(model)
    assert "\na hybrid, whose " in text and ("full_attention" not in text)
    told = [line for line in text.splitlines() if line.startswith("layer") and line.endswith(f" P={P}")]
    assert sum(map(layers_of, told)) == ATTENTION[name]


@pytest.mark.parametrize("name", hybrids.ROWS)
def test_packed_rows_of_a_hybrid_are_refused(name: str) -> None:
    """Its states would carry one document into the next."""
    model, ids = ROWS[name].build(), inputs(name)["input_ids"][:1]
    fastprefix.attach(model, PrefixConfig(P, init=START))
    with pytest.raises(ValueError, match=r"position_ids: got packed documents .* carry a state past its end"):
        model(ids, position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]]))
    model(ids, position_ids=torch.arange(S)[None])


@pytest.mark.slow
def test_packed_rows_of_a_compiled_hybrid_are_refused() -> None:
    """Ids cannot be read in a graph: there a mask beside them has to say that a row is one document."""
    ids, where = inputs("lfm2")["input_ids"][:1], torch.arange(S)[None]
    for packed in (torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]]), where):
        model = ROWS["lfm2"].build()
        fastprefix.attach(model, PrefixConfig(P, init=START))
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="eager", fullgraph=packed is where)
        with pytest.raises((ValueError, torch._dynamo.exc.Unsupported), match="position_ids: got"):
            compiled(ids, position_ids=packed)
    torch._dynamo.reset()
    got = torch.compile(model, backend="eager")(ids, position_ids=where, attention_mask=torch.ones_like(ids)).logits
    torch.testing.assert_close(got, model(ids).logits, rtol=1e-4, atol=1e-4)


def test_a_layer_past_the_interface_is_no_state() -> None:
    """Fewer layers dispatch than the kinds in the config say: one of them has attention of its own."""
    model = ROWS["qwen3_next"].build()
    model.config.layer_types = ["full_attention", "full_attention"]
    with pytest.raises(ValueError, match="once in each of its 2 layers of attention, but 1 times"):
        fastprefix.attach(model, PrefixConfig(P))
    assert find_installation(model) is None


def test_two_calls_in_a_layer_are_refused() -> None:
    model = transformers.DiffLlamaForCausalLM(transformers.DiffLlamaConfig(**ROWS["llama_gqa"].options))
    with pytest.raises(ValueError, match=r"DiffLlamaForCausalLM, .* in each of its 2 layers of attention, but 4 ti"):
        fastprefix.attach(model, PrefixConfig(P))


def test_a_prompt_that_is_shared_needs_keys_of_its_own_in_every_layer() -> None:
    model = ROWS["jamba"].build()
    with pytest.raises(ValueError, match=f"model: got {ROWS['jamba'].cls}, .*have no attention"):
        fastprefix.attach(model, PromptConfig(P))
    error = pytest.raises(ValueError, match=f"model: got {ROWS['jamba'].cls}, .*have no attention")
    with error, fastprefix.shared_prompt(model, [3, 4]):
        pass
    assert find_installation(model) is None


def test_a_prompt_of_an_encoder_runs_with_the_rows_and_needs_none() -> None:
    """ALBERT's one attention module is every layer, and in an encoder nothing is shared."""
    model, ids = ROWS["albert"].build(), torch.arange(10, 22).view(2, 6)
    prompt = torch.tensor([[3, 4]]).expand(2, -1)
    with torch.no_grad():
        want = model(torch.cat([prompt, ids], 1))[0][:, 2:]
        with fastprefix.shared_prompt(model, [3, 4]):
            torch.testing.assert_close(model(ids)[0], want, rtol=1e-5, atol=1e-5)


def test_one_module_that_is_every_layer_has_one_prefix() -> None:
    model = replace(ROWS["albert"], options={**ROWS["albert"].options, "num_hidden_layers": 4}).build()
    prefix = fastprefix.attach(model, PrefixConfig(P, init=START))
    assert len(prefix.layers) == 1 and require_installation(model).facts.layers.reuses_modules
    assert f"P={P}" in fastprefix.explain(model)
    fastprefix.detach(model)
    with pytest.raises(ValueError, match="init: got token_ids for AlbertModel, which runs one module as several"):
        fastprefix.attach(model, PrefixConfig(2, init=fastprefix.init.token_ids([3, 4])))


def test_layers_of_two_groups_have_two() -> None:
    options = {**ROWS["albert"].options, "num_hidden_layers": 4, "num_hidden_groups": 2}
    prefix = fastprefix.attach(replace(ROWS["albert"], options=options).build(), PrefixConfig(P))
    assert len(prefix.layers) == 2


@pytest.mark.parametrize("name", LED)
def test_a_led_model_copies_pickles_and_is_given_back(name: str) -> None:
    model, batch = ROWS[name].build(), inputs(name, "left", torch.float32)
    fastprefix.attach(model, PrefixConfig(P, init=START))
    want = model(**batch).logits
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        modules = {id(m) for m in twin.modules()}
        assert {id(led.module) for led in leds(twin)} <= modules and leds(twin)
        assert torch.equal(twin(**batch).logits, want)
        fastprefix.detach(twin)
        assert not leds(twin)
    assert torch.equal(model(**batch).logits, want)
    fastprefix.detach(model)
    assert not leds(model)


def leds(model: Any) -> list[MethodOverride]:
    return [x for m in model.modules() for x in vars(m).values() if isinstance(x, MethodOverride)]


@pytest.mark.parametrize("name", ["gptj", "falcon"])
def test_what_stood_in_a_methods_place_is_back_there(name: str) -> None:
    """A hook of accelerate's, a profiler: called while no prefix is active, and after."""
    model, batch, calls = ROWS[name].build(), inputs(name, dtype=torch.float32), []
    way = next(iter(find_overrides(model)))
    original = getattr(way.module, way.method)

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        return original(*args, **kwargs)

    way.module.__dict__[way.method] = wrapper
    fastprefix.attach(model, PrefixConfig(P, init=START))
    calls.clear()
    model(**batch)
    assert not calls
    fastprefix.set_prefix(model, None)
    model(**batch)
    fastprefix.detach(model)
    assert way.module.__dict__[way.method] is wrapper
    model(**batch)
    assert len(calls) == 2


def test_gpt_neo_takes_a_float_mask_of_the_callers_own() -> None:
    model, ids = ROWS["gpt_neo"].build(), inputs("gpt_neo")["input_ids"]
    fastprefix.attach(model, PrefixConfig(P, init=START))
    mask = torch.full((S, S), torch.finfo(torch.float32).min).triu(1).expand(3, 1, S, S)
    torch.testing.assert_close(model(ids, attention_mask=mask).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


def test_gpt_neo_hides_content_outside_its_window_and_no_prefix() -> None:
    """Its local layer: the last row's logits depend on the window's tokens and on the prefix, whatever the length."""
    one = {"num_layers": 1, "num_hidden_layers": 1, "attention_types": [[["local"], 1]], "window_size": 3}
    options = {**ROWS["gpt_neo"].options, **one}
    model = replace(ROWS["gpt_neo"], options=options).build()
    ids = inputs("gpt_neo")["input_ids"][:1]
    other = ids.clone()
    other[0, 0] = 98 - other[0, 0]
    fastprefix.attach(model, PrefixConfig(P, init=START))
    last = model(ids).logits[0, -1]
    assert torch.equal(model(other).logits[0, -1], last)
    fastprefix.set_prefix(model, None)
    assert not torch.allclose(model(ids).logits[0, -1], last, atol=1e-3)


@pytest.mark.parametrize("options", [{}, {"num_kv_heads": 1, "multi_query": True, "new_decoder_architecture": False}])
def test_falcon_of_both_architectures(options: dict[str, Any]) -> None:
    """Groups of heads, repeated by the model, are read once: the prefix has the key/value heads."""
    model = replace(ROWS["falcon"], options={**ROWS["falcon"].options, **options}).build()
    prefix = fastprefix.attach(model, PrefixConfig(P, init=START))
    assert prefix.shapes[0].num_kv_heads == (1 if options else 2)
    batch = inputs("falcon", "left", torch.float32)
    out = model.generate(**batch, max_new_tokens=4, do_sample=False, eos_token_id=None)
    mask = torch.cat([batch["attention_mask"], torch.ones(3, 4, dtype=torch.long)], 1)
    logits = model(input_ids=out, attention_mask=mask, use_cache=False).logits
    assert torch.equal(logits[:, S - 1 : -1].argmax(-1), out[:, S:])
