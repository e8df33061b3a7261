"""Results are plain data for JSON and figures; wrong calls name the argument."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

import fastprefix
from fastprefix import LlamaAdapterConfig, PrefixConfig, PrefixMemoryConfig, PromptConfig, analysis
from tests.analysis.dense import attached
from tests.model_zoo.architectures import ROWS
from tests.model_zoo.inputs import inputs

OF_BATCH: dict[str, Callable[..., Any]] = {
    "prefix_mass": analysis.prefix_mass,
    "bias_decomposition": analysis.bias_decomposition,
    "slot_mass": analysis.slot_mass,
    "relative_attention": analysis.relative_attention,
}


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    model, _ = attached("llama_gqa")
    batch = inputs("llama_gqa", "left")
    found = {name: function(model, batch) for name, function in OF_BATCH.items()}
    found["slot_geometry"], found["slot_map"] = analysis.slot_geometry(model), analysis.slot_map(model, batch)
    found["activations"] = analysis.activations(model, {"one": batch, "two": inputs("llama_gqa")})
    prompt = fastprefix.attach(model, PromptConfig(4), "prompt")
    found["prompt_place"] = analysis.prompt_place(model, "prompt", start=prompt().detach() + 0.1)
    return found


NAMES = [*OF_BATCH, "slot_geometry", "slot_map", "activations", "prompt_place"]


@pytest.mark.parametrize("name", NAMES)
def test_to_dict_is_json(name: str, results: dict[str, Any]) -> None:
    found = results[name].to_dict()
    again = json.loads(json.dumps(found, allow_nan=False))
    fields = {field.name for field in dataclasses.fields(results[name])}
    assert again.keys() >= fields and len(again.get("layers", "no")) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(results[name], min(fields), ())


def test_padding_is_none_in_json(results: dict[str, Any]) -> None:
    mass = results["prefix_mass"].to_dict()["mass"]
    assert mass[0][0][0][:4] == [None] * 4 and mass[0][0][0][4] == results["prefix_mass"].mass[0][0, 0, 4].item()


@pytest.mark.parametrize("name", NAMES)
def test_plot_draws(name: str, results: dict[str, Any], tmp_path: Any) -> None:
    pytest.importorskip("matplotlib")
    made = results[name].plot()
    made.savefig(tmp_path / "it.png")
    assert made.axes and (tmp_path / "it.png").stat().st_size > 5000
    assert all(axes.images or axes.lines or axes.patches or axes.collections for axes in made.axes)


@pytest.mark.parametrize("name", NAMES)
def test_plot_without_matplotlib(name: str, results: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr("fastprefix.analysis.result.find_spec", lambda n: None if n == "matplotlib" else found(n))
    with pytest.raises(ImportError, match=r"a plot needs matplotlib: pip install 'fastprefix\[analysis\]'"):
        results[name].plot()


@pytest.mark.parametrize("function", OF_BATCH.values(), ids=OF_BATCH)
class TestWrongCalls:
    def test_no_prefix(self, function: Callable[..., Any]) -> None:
        with pytest.raises(ValueError, match="model: got LlamaForCausalLM without a prefix"):
            function(ROWS["llama_gqa"].build(), inputs("llama_gqa"))

    def test_none_active(self, function: Callable[..., Any]) -> None:
        model, _ = attached("llama_gqa")
        fastprefix.set_prefix(model, None)
        with pytest.raises(ValueError, match="name: got None, expected a prefix: none is active"):
            function(model, inputs("llama_gqa"))
        assert function(model, inputs("llama_gqa"), "default").layers
        assert not model.training and model(**inputs("llama_gqa")).logits.isfinite().all()

    def test_an_unknown_name(self, function: Callable[..., Any]) -> None:
        model, _ = attached("llama_gqa")
        with pytest.raises(ValueError, match=r"name: got 'other', expected None or one of \['default'\]"):
            function(model, inputs("llama_gqa"), "other")

    @pytest.mark.parametrize("batch", [None, "text", {}, {"text": "one"}, [torch.ones(1, 2)]])
    def test_no_batch(self, function: Callable[..., Any], batch: Any) -> None:
        model, _ = attached("llama_gqa")
        with pytest.raises(ValueError, match=r"batch: got .*, expected a mapping of tensors"):
            function(model, batch)

    def test_a_mask_of_another_shape(self, function: Callable[..., Any]) -> None:
        model, _ = attached("llama_gqa")
        batch = {**inputs("llama_gqa"), "attention_mask": torch.ones(3, 1, 9, 9).bool()}
        with pytest.raises(ValueError, match=r"batch: got attention_mask of shape \[3, 1, 9, 9\], expected \[B, S\] ="):
            function(model, batch)

    @pytest.mark.parametrize(
        ("config", "kind"),
        [
            (LlamaAdapterConfig(3), "LLaMA-Adapter"),
            (PrefixConfig(3, gate="tanh", position_offset="none"), "gated prefix"),
            (PrefixMemoryConfig(), "prefix memory"),
        ],
    )
    def test_what_is_added(self, function: Callable[..., Any], config: Any, kind: str) -> None:
        model = ROWS["llama_gqa"].build()
        fastprefix.attach(model, config)
        with pytest.raises(ValueError, match=f"name: got 'default', a {kind}, expected a prefix in one softmax"):
            function(model, inputs("llama_gqa"))

    def test_a_prompt_inside_the_rows(self, function: Callable[..., Any]) -> None:
        model = ROWS["llama_gqa"].build()
        fastprefix.attach(model, PromptConfig(3, place="after"))
        fastprefix.attach(model, PrefixConfig(3), "other")
        with pytest.raises(ValueError, match="name: got 'default', a soft prompt that runs inside every row"):
            function(model, inputs("llama_gqa"), "default")

    @pytest.mark.filterwarnings("ignore:fastprefix")
    def test_a_prompt_in_an_encoder(self, function: Callable[..., Any]) -> None:
        model = ROWS["bert"].build()
        fastprefix.attach(model, PromptConfig(3))
        with pytest.raises(ValueError, match="name: got 'default', a soft prompt that runs inside every row"):
            function(model, inputs("bert"))


def test_geometry_of_no_prefix() -> None:
    model, _ = attached("llama_gqa")
    with pytest.raises(ValueError, match=r"name: got 'other', expected one of \['default'\]"):
        analysis.slot_geometry(model, "other")
    fastprefix.set_prefix(model, None)
    with pytest.raises(ValueError, match="name: got None, expected a prefix: none is active"):
        analysis.slot_geometry(model)


def test_a_patched_model() -> None:
    """PEFT's prefix has the mass that the same numbers have in an attached one."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        ROWS["llama_gqa"].build(), peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    )
    fastprefix.patch(model)
    batch = inputs("llama_gqa", "left")
    found = [function(model.eval(), batch) for function in OF_BATCH.values()]
    assert all(len(each.layers) == 2 for each in found) and 0.0 < float(found[0].by_layer()[0]) < 1.0
    want = model(**batch).logits
    assert torch.equal(model(**batch).logits, want)
    with pytest.raises(ValueError, match="model: got a patched"):
        analysis.slot_geometry(model)
