"""What a patched model is: PEFT's parameters, files and adapters; it copies, pickles, and is PEFT's again after."""

from __future__ import annotations

import copy
import functools
import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file  # noqa: E402

import fastprefix  # noqa: E402
from tests.model_zoo.architectures import REFUSED, ROWS  # noqa: E402
from tests.model_zoo.encoder_decoders import ROWS as ENCODER_DECODERS  # noqa: E402
from tests.model_zoo.peft_models import (  # noqa: E402
    ADAPTION,
    GREEDY,
    KINDS,
    PREFIX,
    P,
    add,
    ids,
    made,
    tasks,
    trained,
    tuned,
)

ENCODED = ("projection", "mlp", "lstm")


def logits(model: Any, kind: str = "prefix") -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids(), **tasks(kind)).logits


def look(model: Any) -> dict[str, Any]:
    """Everything that a patch may not leave behind."""
    base = model.get_base_model()
    return {
        "class": type(model),
        "attributes": (set(vars(model)), set(vars(base))),
        "config": (id(base.config), base.config._attn_implementation),
        "modules": [(name, type(module)) for name, module in model.named_modules()],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        "parameters": [(name, id(p), p.requires_grad) for name, p in model.named_parameters()],
    }


@pytest.mark.parametrize("kind", KINDS)
def test_patched_and_unpatched(kind: str) -> None:
    model = made(False, kind)
    before, want = look(model), logits(model, kind)
    state = {name: id(x) for name, x in model.state_dict(keep_vars=True).items()}
    assert fastprefix.patch(model) is model and isinstance(model, before["class"])
    assert fastprefix.patch(model) is model and type(model).__bases__[1] is before["class"]  # twice is once
    torch.testing.assert_close(logits(model, kind), want, rtol=1e-4, atol=1e-4)
    model.generate(input_ids=ids(), **tasks(kind), **GREEDY)
    with model.disable_adapter():
        logits(model)
    assert look(model)["parameters"] == before["parameters"]
    assert {name: id(x) for name, x in model.state_dict(keep_vars=True).items()} == state
    assert fastprefix.unpatch(model) is model
    assert look(model) == before
    assert torch.equal(logits(model, kind), want)


@pytest.mark.parametrize("kind", KINDS)
def test_files_are_peft_s(kind: str, tmp_path: Path) -> None:
    """And PEFT reads them, for use."""
    theirs, ours = made(False, kind), made(True, kind)
    theirs.save_pretrained(tmp_path / "theirs"), ours.save_pretrained(tmp_path / "ours")
    names = [{file.name for file in (tmp_path / who).iterdir()} for who in ("theirs", "ours")]
    assert names[1] - names[0] == ({"prompt_encoder.safetensors"} if kind in ENCODED else set())
    assert names[0] <= names[1]
    configs = [json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("theirs", "ours")]
    assert configs[0] == configs[1]
    tensors = [load_file(tmp_path / who / "adapter_model.safetensors") for who in ("theirs", "ours")]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(x, tensors[1][name]) for name, x in tensors[0].items())
    for patched in (False, True):
        loaded = peft.PeftModel.from_pretrained(ROWS["llama_gqa"].build(), tmp_path / "ours")
        loaded = fastprefix.patch(loaded) if patched else loaded
        torch.testing.assert_close(logits(loaded, kind), logits(theirs, kind), rtol=1e-4, atol=1e-4)


def _configuration(kind: str) -> Any:
    if kind == "adaption":
        return ADAPTION(task_type="CAUSAL_LM", adapter_len=3, adapter_layers=1)
    cls, own = KINDS[kind]
    return cls(task_type="CAUSAL_LM", **{**own, "num_virtual_tokens": 3})


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_come_go_and_switch_as_peft_s(kind: str) -> None:
    def told(model: Any) -> list[Any]:
        """What can be seen after each thing that is done."""
        seen: list[Any] = []

        def look_now() -> None:
            seen.append((logits(model, kind), set(trained(model)), model.active_adapter, sorted(model.peft_config)))

        torch.manual_seed(3)
        model.add_adapter("other", _configuration(kind))
        look_now()
        model.set_adapter("other")
        with torch.no_grad():
            for name, p in model.named_parameters():
                if name.endswith("adaption_gate"):
                    p.fill_(-0.4)
        look_now()
        with model.disable_adapter():
            seen.append((model(input_ids=ids()).logits, set(), None, []))
        look_now()
        model.set_adapter("default")
        look_now()
        model.delete_adapter("default")
        look_now()
        return seen

    for want, got in zip(told(made(False, kind)), told(made(True, kind)), strict=True):
        torch.testing.assert_close(got[0], want[0], rtol=1e-4, atol=1e-4)
        assert got[1:] == want[1:]


def test_an_adapter_of_other_shapes_is_refused_and_gone() -> None:
    model = tuned(True)
    message = "num_layers: got 1, expected 2, the model's attention layers"
    with pytest.raises(ValueError, match=re.escape(message)):
        add(model, "bad", num_layers=1, token_dim=16, num_attention_heads=2)
    assert list(model.peft_config) == list(model.prompt_encoder) == ["default"]
    with pytest.raises(ValueError, match="Adapter with name 'default' already exists"):
        add(model, "default")
    torch.testing.assert_close(logits(model), logits(tuned(False)), rtol=1e-4, atol=1e-4)


COPIES: dict[str, Callable[[Any], Any]] = {"deepcopy": copy.deepcopy, "pickle": lambda x: pickle.loads(pickle.dumps(x))}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("kind", KINDS)
def test_copies_are_models_of_their_own(kind: str, how: str) -> None:
    model = made(True, kind)
    want = logits(model, kind)
    twin = COPIES[how](model)
    assert type(twin) is type(model) and torch.equal(logits(twin, kind), want)
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(1.5)
    assert torch.equal(logits(model, kind), want) and not torch.equal(logits(twin, kind), want)
    assert not hasattr(fastprefix.unpatch(twin).get_base_model(), "_fastprefix")
    assert torch.equal(logits(model, kind), want)


LORA = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
KNOWN = "PREFIX_TUNING, CARTRIDGE, PROMPT_TUNING, P_TUNING, MULTITASK_PROMPT_TUNING, ADAPTION_PROMPT"


def _attached() -> Any:
    model = tuned(False)
    fastprefix.attach(model.get_base_model(), fastprefix.PrefixConfig(P))
    return model


def _of(model: Any, cls: Any, **options: Any) -> Any:
    return peft.get_peft_model(model, cls(num_virtual_tokens=P, **options))


MULTITASK = functools.partial(peft.MultitaskPromptTuningConfig, num_tasks=2)
ONE_STACK = functools.partial(PREFIX, num_transformer_submodules=1)
OTHER_HEADS = functools.partial(PREFIX, num_attention_heads=2, token_dim=32)
DISPATCH = "whose attention does not go through transformers' attention interface"
WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "a bare model": (
        lambda: ROWS["llama_gqa"].build(),
        "peft_model: got LlamaForCausalLM, expected a peft.PeftModel (fastprefix.attach takes bare models)",
    ),
    "LoRA": (
        lambda: peft.get_peft_model(ROWS["llama_gqa"].build(), LORA),
        f"peft_model: got adapters of type LORA, expected one of {KNOWN}",
    ),
    "attached": (
        _attached,
        "peft_model: got a LlamaForCausalLM that something is attached to, expected one without; detach it first",
    ),
    "a speech model": (
        lambda: _of(ENCODER_DECODERS["whisper"].build(), PREFIX, task_type="SEQ_2_SEQ_LM"),
        "model: got WhisperForConditionalGeneration, which reads input_features, expected a model of input_ids",
    ),
    "prompts in front of the decoder": (
        lambda: _of(ENCODER_DECODERS["t5"].build(), MULTITASK, task_type="SEQ_2_SEQ_LM"),
        "num_transformer_submodules: got 2 of adapter 'default': PEFT trains it with a prompt in front of the "
        "decoder's rows too, and generates without that, expected 1 in the MultitaskPromptTuningConfig",
    ),
    "a prefix for one stack alone": (
        lambda: _of(ENCODER_DECODERS["t5"].build(), ONE_STACK, task_type="SEQ_2_SEQ_LM"),
        "num_transformer_submodules: got 1, expected 2, or 3 of a patched model: the model is an encoder-decoder",
    ),
    "other heads than the decoder's": (
        lambda: _of(ENCODER_DECODERS["t5"].build(), OTHER_HEADS, task_type="SEQ_2_SEQ_LM"),
        "token_dim: got 2 key/value heads of 16, expected those of the decoder: 4 of 8",
    ),
    "attention of its own": (
        lambda: _of(REFUSED["bloom"](), PREFIX, task_type="CAUSAL_LM"),
        f"model: got BloomForCausalLM, {DISPATCH}",
    ),
    "keys and values that differ": (
        lambda: tuned(False, row="deepseek_v3"),
        "token_dim: got a prefix with one head dim, 8, expected keys of 20 and values of 8",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_cannot_be_patched_is_refused_and_left_alone(what: str) -> None:
    make, message = WRONG[what]
    model = make()
    before = look(model) if hasattr(model, "get_base_model") else None
    with pytest.raises(ValueError, match=re.escape(message)):
        fastprefix.patch(model)
    assert before is None or look(model) == before


def test_what_is_not_patched_cannot_be_unpatched() -> None:
    expected = "expected a model that fastprefix.patch was called on"
    for model, name in ((tuned(False), "PeftModelForCausalLM"), (ROWS["llama_gqa"].build(), "LlamaForCausalLM")):
        with pytest.raises(ValueError, match=f"peft_model: got {name}, {expected}"):
            fastprefix.unpatch(model)
