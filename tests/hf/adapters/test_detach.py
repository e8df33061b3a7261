"""``detach`` with a name: one prefix leaves the model, the others compute the same bits as before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
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
NAMES = ("direct", "projected", "frozen", "layers", "prompt")


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


@contextmanager
def in_a_batch(model: Any) -> Iterator[None]:
    with fastprefix.prefix_batch(model, ["direct", None]):
        yield


@contextmanager
def in_a_shared_prompt(model: Any) -> Iterator[None]:
    with fastprefix.shared_prompt(model, torch.arange(3, 6)):
        yield


@pytest.mark.parametrize("block", [in_a_batch, in_a_shared_prompt])
def test_not_inside_a_block(block: Any) -> None:
    model = several()
    for name in ("direct", "prompt"):
        which = "prefix_batch" if block is in_a_batch else "shared_prompt"
        with block(model), pytest.raises(ValueError, match=f"name: got '{name}' inside a block of {which}, expected"):
            fastprefix.detach(model, name)
    want = outputs(model, NAMES)
    fastprefix.detach(model, "direct")
    assert same_outputs(outputs(model, NAMES[1:]), want)


@pytest.mark.parametrize("name", ["nothing", "", 3, ("direct", "prompt")])
def test_names_that_nothing_has(name: Any) -> None:
    model = several()
    with pytest.raises(ValueError, match=r"name: got .*, expected None or one of \['direct', 'frozen', 'layers'"):
        fastprefix.detach(model, name)
    assert list(model._fastprefix.selection.prefixes) == list(NAMES)


def test_a_wrapper_that_has_collected_the_parameters() -> None:
    model = several()
    averaged = torch.optim.swa_utils.AveragedModel(model)
    with pytest.raises(ValueError, match="model: got a AveragedModel around it, expected the model itself"):
        fastprefix.detach(averaged, "direct")
    assert "direct" in averaged.module._fastprefix.selection.prefixes


@torch.no_grad()
def test_a_cache_belongs_to_the_prefix_that_was_taken_out() -> None:
    model = several()
    caches = {}
    for name in ("direct", "frozen"):
        fastprefix.set_prefix(model, name)
        caches[name] = model(IDS, use_cache=True).past_key_values
    with fastprefix.prefix_batch(model, ["direct", "frozen"]):
        both = model(IDS, use_cache=True).past_key_values
    fastprefix.detach(model, "direct")
    fastprefix.attach(model, PrefixConfig(3, init=init.normal(0.5)), "direct")
    with pytest.raises(ValueError, match="past_key_values: got a cache made with prefix 'direct'"):
        model(IDS[:, :1], past_key_values=caches["direct"])
    with (
        fastprefix.prefix_batch(model, ["direct", "frozen"]),
        pytest.raises(ValueError, match="past_key_values: got a cache made with prefixes"),
    ):
        model(IDS[:, :1], past_key_values=both)
    fastprefix.set_prefix(model, "frozen")
    model(IDS[:, :1], past_key_values=caches["frozen"])
    both.batch_select_indices(torch.tensor([1]))
    with fastprefix.prefix_batch(model, ["frozen"]):
        model(IDS[1:, :1], past_key_values=both)


@pytest.mark.parametrize("reentrant", [True, False])
def test_between_a_checkpointed_forward_and_its_backward(reentrant: bool) -> None:
    model = several()
    fastprefix.set_prefix(model, "direct")
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    loss = model(IDS, labels=IDS, use_cache=False).loss
    fastprefix.detach(model, "direct")
    with pytest.raises(RuntimeError, match="the prefix was taken out between a checkpointed forward and its backward"):
        loss.backward()
    fastprefix.set_prefix(model, "frozen")
    model(IDS, labels=IDS, use_cache=False).loss.backward()
    loss = model(IDS, labels=IDS, use_cache=False).loss
    fastprefix.detach(model, "projected")  # another one may go
    loss.backward()
