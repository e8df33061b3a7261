"""Models around a language model: a prefix or a prompt of a text's tokens equals that text in front of every row."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import fastprefix
from fastprefix import PrefixConfig, PromptConfig, init
from fastprefix.hf.adapters.lookup import require_installation
from tests.model_zoo.vision_language import CONFIGS, build, with_image

TEXT = [5, 6, 7, 8]
IDS = torch.arange(10, 19).reshape(1, -1)
# Stored in fp32, what the model made of the text in fp64.
CLOSE = {"rtol": 2e-6, "atol": 2e-6}
# PaliGemma reads text in both directions: a text's keys depend on the row, which those of a prefix never do.
CAUSAL = [name for name in CONFIGS if not name.startswith("PaliGemma")]
SHARES = [(name, PromptConfig) for name in CONFIGS] + [(name, PrefixConfig) for name in CAUSAL]


def attached(cls: str, config: Any) -> tuple[Any, Any, Any]:
    """A bare model, and a copy that reads the text."""
    bare = build(cls)
    model = copy.deepcopy(bare)
    prefix = fastprefix.attach(model, config(len(TEXT), init=init.token_ids(TEXT)))
    return bare, model, prefix.double()


def in_context(inputs: dict[str, Any], padding: int = 0) -> dict[str, Any]:
    """The same row behind the text, whose padding then stands in front of both."""
    found = dict(inputs)
    text = torch.tensor([TEXT])
    for name, front in (("input_ids", text), ("attention_mask", torch.ones_like(text)), ("labels", text * 0 - 100)):
        if name in inputs:
            row = inputs[name]
            found[name] = torch.cat([row[:, :padding], front, row[:, padding:]], 1)
    if "mm_token_type_ids" in inputs:
        found["mm_token_type_ids"] = torch.cat([torch.zeros_like(text).int(), inputs["mm_token_type_ids"]], 1)
    return found


def padded(count: int) -> dict[str, Tensor]:
    """A row with so many places of padding on the left, the first token no label."""
    mask = torch.ones(1, IDS.shape[1] + count, dtype=torch.long)
    mask[:, :count] = 0
    ids = torch.nn.functional.pad(IDS, (count, 0))
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


@pytest.mark.filterwarnings("ignore:fastprefix. the prompt is concatenated")
@pytest.mark.parametrize("case", ["text", "full mask", "padded", "image", "image, full mask"])
@pytest.mark.parametrize(("cls", "config"), SHARES)
def test_equals_the_text_in_context(cls: str, config: Any, case: str) -> None:
    bare, model, _ = attached(cls, config)
    inputs: dict[str, Any] = with_image(cls, IDS) if "image" in case else {"input_ids": IDS}
    if case == "padded":
        inputs = padded(3)
    if "full mask" in case:
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs.setdefault("labels", inputs["input_ids"])
    skip = 3 if case == "padded" else 0
    if skip:
        whole = in_context(inputs, skip)
        positions = (whole["attention_mask"].cumsum(1) - 1).clamp(min=0)
        whole["position_ids"] = positions + (1 if cls.startswith("PaliGemma") else 0)
    else:
        whole = in_context(inputs)
    want, got = bare(**whole), model(**inputs)
    torch.testing.assert_close(got.logits[:, skip:], want.logits[:, skip + len(TEXT) :], **CLOSE)
    if config is PromptConfig:  # the prompt's last token predicts the row's first
        torch.testing.assert_close(got.loss, want.loss, **CLOSE)


@pytest.mark.filterwarnings("ignore:fastprefix. the prompt is concatenated")
@pytest.mark.parametrize("cls", CONFIGS)
def test_the_gradient_of_a_soft_prompt_is_that_of_concatenation(cls: str) -> None:
    bare, model, prompt = attached(cls, PromptConfig)
    got = model(input_ids=IDS, labels=IDS).loss
    twin = prompt.embedding.detach().clone().requires_grad_()
    whole = torch.cat([twin[None], bare.get_input_embeddings()(IDS)], 1)
    want = bare(inputs_embeds=whole, labels=torch.cat([torch.full((1, len(TEXT)), -100), IDS], 1)).loss
    torch.testing.assert_close(got, want, **CLOSE)
    grads = torch.autograd.grad(got, [prompt.embedding]), torch.autograd.grad(want, [twin])
    torch.testing.assert_close(*grads, **CLOSE)
    assert grads[0][0].abs().max() > 1e-3


@pytest.mark.parametrize("config", [PrefixConfig, PromptConfig])
@pytest.mark.parametrize("cls", CAUSAL)
def test_generates_as_with_the_text_in_context(cls: str, config: Any) -> None:
    bare, model, _ = attached(cls, config)
    inputs = with_image(cls, IDS)
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    scores: dict[str, Any] = {"output_scores": True, "return_dict_in_generate": True}
    want = bare.generate(**in_context(inputs), **options, **scores)
    got = model.generate(**inputs, **options, **scores)
    assert torch.equal(got.sequences, want.sequences[:, len(TEXT) :])
    torch.testing.assert_close(torch.stack(got.scores), torch.stack(want.scores), **CLOSE)


@pytest.mark.parametrize("cls", ["LlavaForConditionalGeneration", "Gemma3ForConditionalGeneration"])
def test_a_shared_prompt_tells_the_next_token(cls: str) -> None:
    model = build(cls)
    want = model(input_ids=torch.cat([torch.tensor([TEXT]), IDS], 1)).logits
    with fastprefix.shared_prompt(model, TEXT) as shared:
        got = model(input_ids=IDS).logits
    torch.testing.assert_close(got, want[:, len(TEXT) :], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(shared.next_logits, want[:, len(TEXT) - 1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("cls", ["LlavaForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration"])
def test_patch_keeps_peft_s_loss(cls: str) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(build(cls), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)).eval()
    with torch.no_grad():
        model.prompt_encoder.default.embedding.weight.normal_()
    want = model(input_ids=IDS, labels=IDS)
    fastprefix.patch(model)
    got = model(input_ids=IDS, labels=IDS)
    torch.testing.assert_close(got.loss, want.loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got.logits, want.logits, rtol=1e-6, atol=1e-6)


def test_a_model_that_makes_no_masks_around_its_layers_has_no_hooks_there() -> None:
    model = build("LlavaForConditionalGeneration")
    fastprefix.attach(model, PrefixConfig(2))
    assert not require_installation(model).outer.handles
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(input_ids=IDS)
