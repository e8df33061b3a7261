"""Attach, use, copy, move, delete: what is left behind, and what two models have in common (nothing)."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fastprefix
from fastprefix import PrefixConfig, PromptConfig, init
from fastprefix.hf.adapters.lookup import require_installation
from tests.model_zoo.architectures import ROWS
from tests.model_zoo.encoder_decoders import ROWS as ENCODER_DECODERS
from tests.support.saved_adapters import numbers, same, state
from tests.support.tiny_models import tiny_model

peft = pytest.importorskip("peft")

IDS = torch.arange(3, 19).view(2, 8)


def direct(seed: int = 1) -> Any:
    torch.manual_seed(seed)
    model = tiny_model()
    fastprefix.attach(model, PrefixConfig(3, init=init.normal(0.5)))
    return model


def mixed() -> Any:
    model = direct()
    fastprefix.attach(model, PrefixConfig(2, prefix_projection=True, encoder_hidden_size=5), "projected")
    fastprefix.attach(model, PromptConfig(2), "prompt")
    return model


def patched() -> Any:
    torch.manual_seed(1)
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    return fastprefix.patch(peft.get_peft_model(tiny_model(), config)).eval()


def led() -> Any:
    model = ROWS["gptj"].build()
    fastprefix.attach(model, PrefixConfig(3, init=init.normal(0.5)))
    return model


MAKERS = {"direct": direct, "mixed": mixed, "patched": patched, "led": led}


def step(model: Any) -> None:
    model(input_ids=IDS, labels=IDS).loss.backward()


def generate(model: Any) -> None:
    model.generate(input_ids=IDS, max_new_tokens=3, do_sample=False)


def blocks(model: Any) -> None:
    names = [None, "default"]
    with fastprefix.prefix_batch(model, names):
        step(model)
        generate(model)
    with fastprefix.shared_prompt(model, torch.arange(3, 6)):
        generate(model)


def checkpointed(model: Any) -> None:
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    step(model)


def refused(model: Any) -> None:
    with pytest.raises(ValueError, match="output_attentions"):
        model(input_ids=IDS, output_attentions=True)


def kept_on_disk(model: Any) -> None:
    if not isinstance(model, peft.PeftModel):
        fastprefix.register(model, {})
        fastprefix.set_prefix(model, None)


USES: tuple[Callable[[Any], None], ...] = (
    lambda model: None,
    step,
    generate,
    blocks,
    checkpointed,
    refused,
    kept_on_disk,
)


@pytest.mark.slow
@pytest.mark.parametrize("use", USES, ids=("nothing", *(use.__name__ for use in USES[1:])))
@pytest.mark.parametrize("kind", MAKERS)
def test_a_deleted_model_is_gone(kind: str, use: Callable[[Any], None]) -> None:
    """Without detach: nothing outside the model holds it, nor what was in it."""
    model = MAKERS[kind]()
    use(model)
    base = model.get_base_model() if kind == "patched" else model
    gone = [weakref.ref(x) for x in (model, base, base._fastprefix, base._fastprefix.slots[0], next(base.parameters()))]
    del model, base
    gc.collect()
    assert not [ref() for ref in gone if ref() is not None]


def test_attached_and_detached_twice() -> None:
    model = tiny_model()
    before = state(model)
    fastprefix.attach(model, PrefixConfig(3))
    with pytest.raises(ValueError, match=r"name: got 'default', expected a new one: \['default'\] are attached"):
        fastprefix.attach(model, PrefixConfig(3))
    fastprefix.attach(model, PrefixConfig(2), "other")
    assert list(model._fastprefix.selection.prefixes) == ["default", "other"]
    fastprefix.detach(model)
    assert state(model) == before
    with pytest.raises(
        ValueError, match="model: got LlamaForCausalLM without a prefix, expected a model that fastprefix"
    ):
        fastprefix.detach(model)
    assert state(model) == before


def by_deepcopy(model: Any) -> Any:
    return copy.deepcopy(model)


def by_pickle(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


def by_torch_save(model: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("make_copy", [by_deepcopy, by_pickle, by_torch_save])
@pytest.mark.parametrize("kind", MAKERS)
def test_a_copy_is_a_model_of_its_own(kind: str, make_copy: Callable[[Any], Any]) -> None:
    """Both train, neither moves the other, and both can be taken apart."""
    model = MAKERS[kind]()
    with torch.no_grad():
        want = model(input_ids=IDS).logits
    twin = make_copy(model)
    with torch.no_grad():
        assert torch.equal(twin(input_ids=IDS).logits, want)
    for one, other in ((twin, model), (model, twin)):
        with torch.no_grad():
            unmoved, before = other(input_ids=IDS).logits, one(input_ids=IDS).logits
        trained = [p for p in one.parameters() if p.requires_grad]
        one(input_ids=IDS, labels=IDS).loss.backward()
        assert any(p.grad is not None for p in trained) and all(p.grad is None for p in other.parameters())
        torch.optim.SGD(trained, lr=5.0).step()
        one.zero_grad()
        with torch.no_grad():
            assert torch.equal(other(input_ids=IDS).logits, unmoved)
            assert not torch.equal(one(input_ids=IDS).logits, before)
    undo = fastprefix.unpatch if kind == "patched" else fastprefix.detach
    with torch.no_grad():
        before = model(input_ids=IDS).logits
        undo(twin)
        assert torch.equal(model(input_ids=IDS).logits, before)
        undo(model)
    bare = model.get_base_model() if kind == "patched" else model
    twins = twin.get_base_model() if kind == "patched" else twin
    assert not hasattr(twins, "_fastprefix")
    assert not any(m._forward_hooks or m._forward_pre_hooks for x in (bare, twins) for m in x.modules())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_patched_without_gradients_it_still_trains(mode: Any) -> None:
    model = fastprefix.unpatch(patched())
    with mode():
        fastprefix.patch(model)
        model(input_ids=IDS)
    step(model)
    assert [n for n, p in model.named_parameters() if p.grad is not None] == ["prompt_encoder.default.embedding.weight"]


@pytest.mark.parametrize("kind", ["direct", "mixed", "patched"])
def test_moved_between_dtypes(kind: str, tmp_path: Path) -> None:
    """Everything moves, the model still trains, and what is saved of it loads as what it was."""
    model = MAKERS[kind]()
    with torch.no_grad():
        want = model(input_ids=IDS).logits
    for move, dtype in (
        (lambda: model.to(torch.bfloat16), torch.bfloat16),
        (model.half, torch.half),
        (model.float, torch.float),
    ):
        move()
        assert {p.dtype for p in model.parameters()} == {dtype}
        out = model(input_ids=IDS, labels=IDS)
        assert out.logits.dtype == dtype
        out.loss.backward()
        assert any(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
        model.zero_grad()
        if kind != "patched" and dtype != torch.float:
            for name, prefix in model._fastprefix.selection.prefixes.items():
                fastprefix.save(model, tmp_path / name, name)
                again = numbers(fastprefix.load(tiny_model(), tmp_path / name))
                assert same(again, {n: x.float() for n, x in numbers(prefix).items()})
    torch.testing.assert_close(model(input_ids=IDS).logits, want, rtol=0.2, atol=0.2)


def test_moved_to_the_meta_device() -> None:
    model = direct().to("meta")
    assert model(IDS.to("meta")).logits.shape == (2, 8, 32)
    with pytest.raises(ValueError, match=r"layers.0.k: got no numbers \(it is on the meta device\)"):
        fastprefix.save(model, "nowhere")
    with pytest.raises(ValueError, match="parameters on the meta device"):
        fastprefix.attach(tiny_model().to("meta"), PrefixConfig(3))


def test_two_models_of_one_config_with_a_prefix_each() -> None:
    first = tiny_model()
    second = type(first)(first.config).eval()
    second.load_state_dict(first.state_dict())
    alone = []
    for seed in (1, 2):
        with torch.no_grad():
            alone.append(direct(seed)(IDS).logits)
    for seed, model in ((1, first), (2, second)):
        torch.manual_seed(seed)
        fastprefix.attach(model, PrefixConfig(3, init=init.normal(0.5)))
    for _ in range(2):
        for model, want in zip((first, second), alone, strict=True):
            assert torch.equal(model(IDS).logits, want)
    fastprefix.detach(first)
    assert torch.equal(second(IDS).logits, alone[1])
    assert second.config._attn_implementation == "fastprefix" and first.config._attn_implementation == "sdpa"


def bart() -> tuple[Any, dict[str, Any]]:
    model = ENCODER_DECODERS["bart"].build()
    fastprefix.attach(model, PrefixConfig(3, init=init.normal(0.5)))
    return model, {"input_ids": IDS, "decoder_input_ids": IDS}


def prompted_bert() -> tuple[Any, dict[str, Any]]:
    model = ROWS["bert"].build()
    fastprefix.attach(model, PromptConfig(3))
    return model, {"input_ids": IDS}


def plain() -> tuple[Any, dict[str, Any]]:
    return direct(), {"input_ids": IDS}


@pytest.mark.filterwarnings("ignore:fastprefix. the prompt is concatenated")
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("make", [plain, bart, prompted_bert])
@torch.no_grad()
def test_an_interrupted_forward_leaves_nothing_to_the_bare_model(make: Any, first: bool) -> None:
    """A table's positions, a prompt's places, a check that waits: torch calls no hook after an interrupt."""
    model, inputs = make()
    fastprefix.set_prefix(model, None)
    want = model(**inputs)[0]
    fastprefix.set_prefix(model, "default")
    if not first:
        model(**inputs)

    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    last = require_installation(model).facts.layers.modules[-1]
    handle = last.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(**inputs)
    handle.remove()
    fastprefix.set_prefix(model, None)
    assert torch.equal(model(**inputs)[0], want)
