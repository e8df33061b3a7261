"""``detach`` with a name: one prefix leaves the model, the others compute the same bits as before."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastprefix
from fastprefix import PrefixConfig, PromptConfig, init
from tests.model_zoo.architectures import ROWS
from tests.model_zoo.encoder_decoders import ROWS as ENCODER_DECODERS
from tests.support.saved_adapters import KINDS, state
from tests.support.tiny_models import tiny_model

pytest.importorskip("transformers")

IDS = torch.arange(3, 19).view(2, 8)
NAMES = ("direct", "projected", "frozen", "layers", "encoded_prompt", "prompt")


def several() -> Any:
    """A model with a prefix of every kind; the soft prompt is active."""
    torch.manual_seed(1)
    model = tiny_model()
    for name in NAMES:
        fastprefix.attach(model, KINDS[name](), name)
    return model


def outputs(model: Any, names: Any, **inputs: Any) -> dict[str | None, Tensor]:
    """A model's output with each of these prefixes, and with none; the active one stays active."""
    before = model._fastprefix.selection.active
    found = {}
    for name in (*names, None):
        fastprefix.set_prefix(model, name)
        with torch.no_grad():
            found[name] = model(**(inputs or {"input_ids": IDS}))[0]
    fastprefix.set_prefix(model, before)
    return found


def same_outputs(got: dict[str | None, Tensor], want: dict[str | None, Tensor]) -> bool:
    return all(torch.equal(x, want[name]) for name, x in got.items())


@pytest.mark.parametrize("active", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_one_leaves_and_the_others_stay(name: str, active: bool) -> None:
    model = several()
    others = [other for other in NAMES if other != name]
    fastprefix.set_prefix(model, name if active else others[0])
    want = outputs(model, others)
    prefix = model._fastprefix.selection.prefixes[name]
    own = {id(p) for p in prefix.parameters()}
    kept = [id(p) for p in model.parameters() if id(p) not in own]
    fastprefix.detach(model, name)
    assert [id(p) for p in model.parameters()] == kept
    assert not any("fastprefix" in key and f".{name}." in key.rpartition("fastprefix")[2] for key in model.state_dict())
    assert model._fastprefix.selection.active == (None if active else others[0])
    with torch.no_grad():
        assert torch.equal(model(IDS)[0], want[None if active else others[0]])
    assert same_outputs(outputs(model, others), want)
    with pytest.raises(ValueError, match=rf"name: got '{name}', expected None or one of \['"):
        fastprefix.set_prefix(model, name)


@pytest.mark.parametrize("order", [NAMES, NAMES[::-1]], ids=["first", "last"])
def test_without_the_last_the_model_is_what_it_was(order: tuple[str, ...]) -> None:
    plain = tiny_model()
    before = state(plain)
    keys = list(plain.state_dict())
    plain(IDS)
    model = several()
    for name in order:
        fastprefix.detach(model, name)
    assert not hasattr(model, "_fastprefix") and list(model.state_dict()) == keys
    assert state(model)[:3] == before[:3] and state(model)[4] == before[4]
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, plain(IDS).logits)
    with pytest.raises(ValueError, match="model: got LlamaForCausalLM without a prefix"):
        fastprefix.detach(model, "direct")


def test_trainable_parameters_are_so_again_after_the_last_alone() -> None:
    model = tiny_model()
    model.model.norm.weight.requires_grad_(False)
    before = [(name, p.requires_grad) for name, p in model.named_parameters()]
    for name in "ab":
        fastprefix.attach(model, PrefixConfig(3), name)
    fastprefix.detach(model, "a")
    frozen = [n for n, p in model.named_parameters() if not p.requires_grad]
    assert frozen == [n for n, _ in before]
    fastprefix.detach(model, "b")
    assert [(name, p.requires_grad) for name, p in model.named_parameters()] == before


def test_a_name_is_free_again_and_optimizers_find_the_new_prefix() -> None:
    model = several()
    fastprefix.detach(model, "projected")
    with torch.random.fork_rng():
        prefix = fastprefix.attach(model, PrefixConfig(2, init=init.normal(0.5)), "projected")
    model(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in prefix.parameters())
    assert {id(p) for p in prefix.parameters()} <= {id(p) for p in model.parameters()}


@pytest.mark.parametrize("name", ["bart", "t5"])
def test_encoder_decoders(name: str) -> None:
    model = ENCODER_DECODERS[name].build()
    before, keys = state(model), list(model.state_dict())
    inputs = {"input_ids": IDS, "decoder_input_ids": IDS}
    fastprefix.attach(model, PrefixConfig(3, init=init.normal(0.5)), "a")
    fastprefix.attach(model, PrefixConfig(2, prefix_projection=True, encoder_hidden_size=5), "b")
    want = outputs(model, "ab", **inputs)
    fastprefix.detach(model, "a")
    assert same_outputs(outputs(model, "b", **inputs), want)
    fastprefix.detach(model, "b")
    assert state(model) == before and list(model.state_dict()) == keys


def test_encoders_with_a_soft_prompt() -> None:
    model = ROWS["bert"].build()
    before = state(model)
    fastprefix.attach(model, PrefixConfig(3, init=init.normal(0.5)), "a")
    want = outputs(model, "a")
    fastprefix.attach(model, PromptConfig(3), "b")
    fastprefix.detach(model, "b")
    assert same_outputs(outputs(model, "a"), want)
    fastprefix.detach(model, "a")
    assert state(model) == before


def test_modules_that_are_trained_with_prefixes() -> None:
    """One with a head of its own, active or not, leaves the others their heads, and the model its own."""
    for active in "ab":
        torch.manual_seed(2)
        model = tiny_model()
        head, before = model.lm_head, state(model)
        for name in "ab":
            fastprefix.attach(model, PrefixConfig(3, init=init.normal(0.5), modules_to_save=["lm_head"]), name)
            torch.nn.init.normal_(model.lm_head.weight)
        fastprefix.attach(model, PrefixConfig(3, init=init.normal(0.5), modules_to_save=["model.norm"]), "c")
        want = outputs(model, "abc")
        fastprefix.set_prefix(model, active)
        heads = {name: model._fastprefix.selection.prefixes[name].modules_to_save.named() for name in "ab"}
        fastprefix.detach(model, "a")
        assert same_outputs(outputs(model, "bc"), want)
        found = {id(p) for p in model.parameters()}
        assert id(heads["a"]["lm_head"].weight) not in found and id(heads["b"]["lm_head"].weight) in found
        fastprefix.detach(model, "b")
        assert model.lm_head is head and same_outputs(outputs(model, "c"), want)
        # The place is the user's again: nothing that is attached has a copy of the module.
        model.lm_head = torch.nn.Linear(32, 32, bias=False)
        fastprefix.set_prefix(model, None)
        fastprefix.set_prefix(model, "c")
        model.lm_head = head
        fastprefix.detach(model, "c")
        assert state(model) == before and "fastprefix" not in str(model)


def on_disk(folder: Path) -> dict[str, Path]:
    for seed, name in enumerate("xy"):
        torch.manual_seed(seed)
        model = tiny_model()
        config = PrefixConfig(3, init=init.normal(0.5), modules_to_save=["lm_head"] if name == "x" else None)
        fastprefix.attach(model, config, name)
        fastprefix.save(model, folder / name, name)
    return {name: folder / name for name in "xy"}


def test_registered_prefixes(tmp_path: Path) -> None:
    paths = on_disk(tmp_path)
    model = tiny_model()
    before = state(model)
    fastprefix.attach(model, PrefixConfig(3, init=init.normal(0.5)), "a")
    fastprefix.register(model, paths)
    want = outputs(model, "axy")
    fastprefix.set_prefix(model, "x")
    provider = model._fastprefix.selection.provider
    fastprefix.detach(model, "x")
    assert provider.names() == ["a", "y"] and list(provider.registry.resident) == ["y"]
    assert model._fastprefix.selection.active is None and not model._fastprefix.modules.places
    assert same_outputs(outputs(model, "ay"), want) and sorted(paths["x"].iterdir())
    fastprefix.register(model, {"x": paths["y"]})
    assert torch.equal(outputs(model, "x")["x"], want["y"])
    fastprefix.detach(model, "a")  # the last one that is attached: those on disk stay
    assert provider.names() == ["y", "x"] and same_outputs(outputs(model, "y"), want)
    for name in "xy":
        fastprefix.detach(model, name)
    assert state(model) == before


def test_what_is_gone_is_not_kept_in_memory() -> None:
    model = several()
    for name in NAMES[:-1]:
        gone = [weakref.ref(p) for p in model._fastprefix.selection.prefixes[name].parameters()]
        fastprefix.detach(model, name)
        gc.collect()
        assert gone and not [ref for ref in gone if ref() is not None]


def test_the_active_one_on_disk_keeps_the_models_module_when_it_is_not_in_memory(tmp_path: Path) -> None:
    model, paths = tiny_model(), on_disk(tmp_path)
    head = model.lm_head
    fastprefix.attach(model, PrefixConfig(3, init=init.normal(0.5)), "a")
    fastprefix.register(model, paths, max_resident=1)
    fastprefix.set_prefix(model, "x")
    with torch.no_grad(), fastprefix.prefix_batch(model, ["y", None]):
        model(IDS)
    assert list(model._fastprefix.selection.provider.registry.resident) == ["y"] and model.lm_head is not head
    fastprefix.detach(model, "a")
    fastprefix.set_prefix(model, None)
    assert model.lm_head is head
