"""Attached prefixes that are not read take no part in training, though their parameters stay trainable."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import fastprefix
from fastprefix import PrefixConfig, init
from tests.support.saved_adapters import KINDS, numbers, same
from tests.support.tiny_models import tiny_model

pytest.importorskip("transformers")

IDS = torch.arange(3, 19).view(2, 8)
NAMES = (*KINDS, "head")


def several() -> tuple[Any, dict[str, Any]]:
    """A model with a prefix of every kind, and the prefixes by name."""
    torch.manual_seed(1)
    model = tiny_model()
    configs = {**{name: make() for name, make in KINDS.items()}, "head": PrefixConfig(3, modules_to_save=["lm_head"])}
    return model, {name: fastprefix.attach(model, config, name) for name, config in configs.items()}


def optimizer(model: Any) -> torch.optim.Optimizer:
    """Of all parameters, as a trainer makes it, with a weight decay that would be seen at once."""
    return torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)


def step(model: Any, adamw: torch.optim.Optimizer) -> None:
    adamw.zero_grad()
    model(IDS, labels=IDS).loss.backward()
    adamw.step()


def state(prefixes: dict[str, Any]) -> dict[str, dict[str, Tensor]]:
    return {name: numbers(prefix) for name, prefix in prefixes.items()}


def changed(prefixes: dict[str, Any], before: dict[str, dict[str, Tensor]]) -> set[str]:
    return {name for name, prefix in prefixes.items() if not same(numbers(prefix), before[name])}


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_step_changes_the_active_one_alone(name: str, checkpointed: bool) -> None:
    model, prefixes = several()
    fastprefix.set_prefix(model, name)
    model.train()
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": True})
    before, adamw = state(prefixes), optimizer(model)
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    for _ in range(2):
        step(model, adamw)
    assert changed(prefixes, before) == {name}
    for other, prefix in prefixes.items():
        assert all((p.grad is None) == (other != name) for p in prefix.parameters() if p.requires_grad)
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)


def test_the_bare_model_trains_none() -> None:
    model, prefixes = several()
    fastprefix.set_prefix(model, None)
    loss = model(IDS, labels=IDS).loss
    assert not loss.requires_grad and all(p.grad is None for x in prefixes.values() for p in x.parameters())


def test_a_batch_trains_those_that_it_names() -> None:
    model, prefixes = several()
    before, adamw = state(prefixes), optimizer(model)
    with fastprefix.prefix_batch(model, ["direct", "prompt"]):
        step(model, adamw)
    assert changed(prefixes, before) == {"direct", "prompt"}


def test_parameters_stay_trainable_and_frozen_ones_frozen() -> None:
    """Neither ``attach`` nor ``set_prefix`` changes what the user has decided about another prefix."""
    model, prefixes = several()
    prefixes["direct"].requires_grad_(False)
    for name in (*NAMES, None, "direct"):
        fastprefix.set_prefix(model, name)
        with torch.random.fork_rng():
            fastprefix.attach(model, PrefixConfig(2, init=init.normal(0.5)), "new")
        for each, prefix in prefixes.items():
            assert {p.requires_grad for p in prefix.parameters()} == {each != "direct"}
        fastprefix.detach(model, "new")
    before, adamw = state(prefixes), optimizer(model)
    with fastprefix.prefix_batch(model, ["direct", "prompt"]):
        step(model, adamw)
    assert changed(prefixes, before) == {"prompt"}


def test_gradients_of_before_are_still_applied() -> None:
    """An optimizer changes whatever has a gradient: one is left by a step before the switch, unless it is cleared."""
    model, prefixes = several()
    adamw = optimizer(model)
    fastprefix.set_prefix(model, "direct")
    model(IDS, labels=IDS).loss.backward()
    fastprefix.set_prefix(model, "frozen")
    before = state(prefixes)
    model(IDS, labels=IDS).loss.backward()
    adamw.step()
    assert changed(prefixes, before) == {"direct", "frozen"}
    before = state(prefixes)
    step(model, adamw)
    assert changed(prefixes, before) == {"frozen"}
    before = state(prefixes)
    fastprefix.set_prefix(model, "direct")
    adamw.zero_grad()
    model(IDS, labels=IDS).loss.backward()  # gradients for the next step alone
    adamw.zero_grad(set_to_none=False)
    fastprefix.set_prefix(model, "frozen")
    model(IDS, labels=IDS).loss.backward()
    adamw.step()
    assert changed(prefixes, before) == {"direct", "frozen"}  # a zero is a gradient, and weights decay


@pytest.mark.slow
@pytest.mark.usefixtures("process_group")
def test_distributed_data_parallel_waits_for_all_but_frozen_ones() -> None:
    """It wants a gradient for every parameter that was trainable when it was made."""
    made = several()

    def run(freeze: bool, **options: Any) -> set[str]:
        model, prefixes = copy.deepcopy(made[0]), {}
        prefixes = model._fastprefix.selection.prefixes
        fastprefix.set_prefix(model, "direct")
        for name, prefix in prefixes.items():
            prefix.requires_grad_(not freeze or name == "direct")
        wrapped = DistributedDataParallel(model, **options)
        before, adamw = state(prefixes), optimizer(model)
        for _ in range(3):
            step(wrapped, adamw)
        return changed(prefixes, before)

    with pytest.raises(RuntimeError, match="Expected to have finished reduction in the prior iteration"):
        run(freeze=False)
    assert run(freeze=False, find_unused_parameters=True) == {"direct"}
    assert run(freeze=True) == {"direct"}
