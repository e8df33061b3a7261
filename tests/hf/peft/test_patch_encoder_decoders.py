"""PEFT's adapters of encoder-decoders under ``patch``: prefixes against concatenation, prompts against PEFT."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastprefix
from fastprefix.prefixes.prefix import Prefix
from tests.model_zoo.encoder_decoders import ROWS, batch, move_positions
from tests.model_zoo.inputs import gradients
from tests.support.concat_oracle import concatenating, run_concat
from tests.support.model_error_rule import StayingInDouble, assert_model_rule

peft = pytest.importorskip("peft")
P, B = 5, 3
# BART's two encoder layers have 4 slots for three decoder layers; T5's three layers have 6.
NAMES = ["bart", "t5", "marian"]
PROMPTS: dict[str, tuple[str, dict[str, Any]]] = {
    "two parts": ("PromptTuningConfig", {}),
    "one part": ("PromptTuningConfig", {"num_transformer_submodules": 1}),
    "mlp": ("PromptEncoderConfig", {}),
    "multitask": ("MultitaskPromptTuningConfig", {"num_tasks": 2, "num_transformer_submodules": 1}),
}
pytestmark = pytest.mark.filterwarnings("ignore:fastprefix. the prompt is concatenated")


def build(name: str, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    return replace(ROWS[name], options={**ROWS[name].options, **options}).build(dtype)


def tuned(base: Any, kind: str = "PrefixTuningConfig", **options: Any) -> Any:
    """PEFT's model with random numbers in the base model's dtype."""
    torch.manual_seed(2)
    config = getattr(peft, kind)(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=P, **options)
    model = peft.get_peft_model(base, config).eval()
    model.prompt_encoder.to(base.dtype)
    if kind == "PrefixTuningConfig" and not options:
        torch.nn.init.normal_(model.prompt_encoder.default.embedding.weight, std=0.6)
    return model


def rows(name: str, padded: str = "none") -> dict[str, Tensor]:
    """Sources and labels; sources padded on a side."""
    found = {"input_ids": batch(name)["input_ids"], "labels": batch(name)["decoder_input_ids"]}
    if padded != "none":
        mask = torch.ones_like(found["input_ids"])
        mask[0, slice(0, 3) if padded == "left" else slice(-3, None)] = 0
        found.update(attention_mask=mask, input_ids=found["input_ids"].masked_fill(mask == 0, 0))
    return found


def held(base: Any, embeddings: Tensor, slots: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Each decoder layer's keys and values as PEFT's ``past_key_values`` hold them: four slots a layer, then again."""
    heads = base.config.num_attention_heads
    each = embeddings.view(P, slots, heads, -1).permute(1, 2, 0, 3)
    t5 = hasattr(base.decoder if hasattr(base, "decoder") else base.model, "block")
    layers = base.decoder.block if t5 else base.get_decoder().layers
    again = torch.cat([each] * (4 * len(layers) // slots + 1)).split(4)
    names = {id(m): n for n, m in base.named_modules()}
    found = {}
    for layer, (k, v, cross_k, cross_v) in zip(layers, again, strict=False):
        own, cross = (
            (layer.layer[0].SelfAttention, layer.layer[1].EncDecAttention) if t5
            else (layer.self_attn, layer.encoder_attn)
        )  # fmt: skip
        found.update({names[id(own)]: (k, v), names[id(cross)]: (cross_k, cross_v)})
    return found


@pytest.mark.parametrize("padded", ["none", "left", "right"])
@pytest.mark.parametrize("name", NAMES)
def test_a_new_prefix_is_read_by_self_and_cross_attention(name: str, padded: str) -> None:
    """Loss and gradients are those of concatenation; none of PEFT's slots is left without a gradient (PEFT 410)."""
    base = build(name)
    model, inputs = tuned(copy.deepcopy(base)), rows(name, padded)
    weight = model.prompt_encoder.default.embedding.weight
    slots = 2 * model.peft_config["default"].num_layers
    with pytest.warns(UserWarning, match="'default' is taken for a new one: the slots of cross-attention"):
        fastprefix.patch(model)
    output = model(**inputs)
    grad = torch.autograd.grad(output.loss, [weight])[0]
    move_positions(base, P)

    def oracle() -> list[Tensor]:
        leaf = weight.detach().clone().requires_grad_()
        want = run_concat(base, held(base, leaf, slots), **inputs)
        return [want.logits, want.loss, torch.autograd.grad(want.loss, [leaf])[0]]

    eager = oracle()
    with StayingInDouble():
        truth = oracle()
    assert_model_rule([output.logits, output.loss, grad], eager, truth)
    assert (grad.view(P, slots, -1).abs().sum(-1) > 0).all()


def test_peft_leaves_half_of_the_slots_without_a_gradient() -> None:
    model = tuned(build("bart", encoder_layers=2, decoder_layers=2))
    model(**rows("bart")).loss.backward()
    grad = model.prompt_encoder.default.embedding.weight.grad.view(P, 4, -1).abs().sum((0, 2))
    assert (grad > 0).tolist() == [True, True, False, False]


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", ["bart", "t5"])
def test_generate_equals_concatenation(name: str, beams: int) -> None:
    base, inputs = build(name), rows(name, "right")
    inputs.pop("labels")
    model = fastprefix.patch(tuned(copy.deepcopy(base)))
    options: dict[str, Any] = {"max_new_tokens": 6, "num_beams": beams, "do_sample": False, "eos_token_id": None}
    got = model.generate(**inputs, **options)
    move_positions(base, P)
    weight = model.prompt_encoder.default.embedding.weight.detach()
    with concatenating(base, held(base, weight, 2 * model.peft_config["default"].num_layers)) as twin:
        assert torch.equal(got, twin.generate(**inputs, **options))


@pytest.mark.parametrize("name", ["bart", "marian"])
def test_a_prefix_that_peft_trained_stays_what_it_is(name: str, tmp_path: Path) -> None:
    """As PEFT computes it: slots of cross-attention have the numbers of their start, and are not read."""
    base = build(name, torch.float32, decoder_layers=2)
    theirs, inputs = tuned(copy.deepcopy(base)), rows(name, "right")
    want = theirs(**inputs)
    theirs.save_pretrained(tmp_path)
    model = fastprefix.patch(peft.PeftModel.from_pretrained(base, tmp_path))
    assert model.peft_config["default"].num_transformer_submodules == 2
    torch.testing.assert_close(model(**inputs).logits, want.logits, rtol=1e-4, atol=1e-5)
    model.load_adapter(tmp_path, "again", is_trainable=True)  # to train on, which PEFT cannot
    model.set_adapter("again")
    output = model(**inputs)
    torch.testing.assert_close(output.loss, want.loss, rtol=1e-4, atol=1e-5)
    output.loss.backward()
    assert model.prompt_encoder.again.embedding.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("projected", [False, True])
def test_saved_loaded_and_unpatched(projected: bool, tmp_path: Path) -> None:
    """Files say that cross-attention reads its slots; PEFT raises for them instead of computing something else."""
    base, inputs = build("bart", torch.float32), rows("bart", "right")
    options = {"prefix_projection": True, "encoder_hidden_size": 7} if projected else {}
    model = fastprefix.patch(tuned(copy.deepcopy(base), **options))
    want = model(**inputs).logits
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["num_transformer_submodules"] == 3
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    with pytest.raises(AttributeError):
        loaded(**inputs)
    torch.testing.assert_close(fastprefix.patch(loaded)(**inputs).logits, want, rtol=1e-5, atol=1e-6)
    prefix = fastprefix.load(base, tmp_path)
    assert isinstance(prefix, Prefix) and set(prefix.parts) == {"decoder", "cross"}
    torch.testing.assert_close(base(**inputs).logits, want, rtol=1e-5, atol=1e-6)
    fastprefix.unpatch(model)
    assert model.peft_config["default"].num_transformer_submodules == 2


@pytest.mark.parametrize("padded", ["none", "right"])
@pytest.mark.parametrize("kind", PROMPTS)
def test_prompts_are_peft_s(kind: str, padded: str) -> None:
    cls, options = PROMPTS[kind]
    theirs, inputs = tuned(build("t5"), cls, **options), rows("t5", padded)
    model = fastprefix.patch(copy.deepcopy(theirs))
    tasks = {"task_ids": torch.tensor([0, 1, 1])} if kind == "multitask" else {}
    found = []
    for each in (model, theirs):
        output = each(**inputs, **({} if not tasks else dict(tasks)))
        trained = [p for p in each.parameters() if p.requires_grad]
        found.append([output.logits, output.loss, *gradients(output.logits, trained)])
        source = {k: x for k, x in inputs.items() if k != "labels"}
        found[-1].append(each.generate(**source, **tasks, max_new_tokens=5, num_beams=2, do_sample=False))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_prompts_beyond_peft() -> None:
    """Left padding that changes nothing, and an adapter for each row."""
    model = fastprefix.patch(tuned(build("t5"), "PromptTuningConfig"))
    model.add_adapter("other", peft.PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=P))
    inputs, names = rows("t5", "left"), ["default", "other", "default"]
    got = model(**inputs, adapter_names=names).logits
    for i, mask in enumerate(inputs["attention_mask"].bool()):
        model.set_adapter(names[i])
        alone = model(input_ids=inputs["input_ids"][i : i + 1, mask], labels=inputs["labels"][i : i + 1]).logits
        torch.testing.assert_close(got[i : i + 1], alone, rtol=1e-6, atol=1e-6)
    with model.disable_adapter():
        bare = model(**inputs).logits
    assert (bare - got).abs().max() > 1e-3
