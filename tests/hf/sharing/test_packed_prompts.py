"""Prompts and rows as one text: the same numbers as one level after the other, in the models that are seen to do so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastprefix
from fastprefix.hf import api  # noqa: F401  registers the attention implementation
from fastprefix.hf.adapters.lookup import find_installation
from fastprefix.hf.sharing import hidden_states
from fastprefix.hf.sharing.plan import SharingPlan, plan_groups
from fastprefix.hf.sharing.shared_prompt import installed
from tests.model_zoo.architectures import ROWS
from tests.support.model_error_rule import StayingInDouble

ONE = [[5, 9, 11, 3]]
RAGGED = [[5, 9, 11, 3, 4, 6], [7, 3], [8, 8, 9]]
ALIKE = [[5, 9, 11, 3, 4], [5, 9, 11, 3, 8], [5, 9, 11, 3, 7, 6]]  # with a beginning
SHAPES = {"one": ONE, "ragged": RAGGED, "alike": ALIKE}


def plan_of(prompts: list[list[int]]) -> SharingPlan:
    rows = torch.tensor([[4, 5, 6], [7, 8, 0], [9, 0, 0], [3, 3, 3], [12, 13, 14]])
    groups = torch.tensor([i % len(prompts) for i in (2, 0, 1, 0, 2)])
    return plan_groups([torch.tensor(p) for p in prompts], rows, rows != 0, groups)


def run(model: Any, plan: SharingPlan, packed: bool) -> list[Tensor]:
    """Hidden states where something is scored, and gradients of a sum of them."""
    installation = installed(model)
    with hidden_states.reading(installation, plan, packed) as inputs:
        assert (inputs["input_ids"].shape[0] == 1) is packed
        hidden = installation.facts.layers.main.owner(**inputs, use_cache=False)[0]
    assert hidden.shape[:2] == plan.labels.shape
    found = hidden[plan.labels != -100]
    weight = torch.randn(found.shape, generator=torch.Generator().manual_seed(0)).double()
    grads = torch.autograd.grad((weight * found).sum(), list(model.parameters()), allow_unused=True)
    return [found, *(g for g in grads if g is not None)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["llama_gqa", "gpt2", "opt", "gptj", "falcon", "cohere", "deepseek_v3", "biogpt"])
def test_both_ways_agree(name: str, shape: str) -> None:
    model = ROWS[name].build(torch.float64).eval()
    plan = plan_of(SHAPES[shape])
    assert (plan.beginning is not None) == (shape == "alike")
    with StayingInDouble():
        got, want = run(model, plan, packed=True), run(model, plan, packed=False)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_a_forward_that_raises_leaves_nothing_behind() -> None:
    model = ROWS["llama_gqa"].build(torch.float64).eval()
    rows = torch.tensor([[4, 5, 6]])
    want = model(rows).logits
    installation, plan = installed(model), plan_of(ONE)
    assert hidden_states.packs(installation)
    hook = model.model.layers[1].register_forward_pre_hook(lambda *args: 1 / 0)
    owner = installation.facts.layers.main.owner
    for way in (True, False):
        with pytest.raises(ZeroDivisionError), hidden_states.reading(installation, plan, way) as inputs:
            owner(**inputs, use_cache=False)
    hook.remove()
    assert torch.equal(model(rows).logits, want)
    assert all(slot.packed is None for slot in installation.slots)
    with fastprefix.shared_prompt(model, ONE[0]):
        model(rows)


class _Counting(nn.Module):
    """A layer that reads the column of a token, and not its position."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        columns = torch.arange(hidden.shape[1], dtype=hidden.dtype)[:, None]
        return self.inner(hidden + 0.1 * columns, *args, **kwargs)


def test_a_model_that_counts_columns_is_not_packed() -> None:
    model = ROWS["llama_gqa"].build(torch.float64).eval()
    model.model.layers[0].mlp = _Counting(model.model.layers[0].mlp)
    installation = installed(model)
    assert not hidden_states.packs(installation)
    with hidden_states.reading(installation, plan_of(RAGGED)) as inputs:
        assert inputs["input_ids"].shape[0] == 5


def test_an_attached_prefix_takes_the_other_way() -> None:
    model = ROWS["llama_gqa"].build(torch.float64).eval()
    fastprefix.attach(model, fastprefix.PrefixConfig(3))
    installation = find_installation(model)
    assert installation is not None
    with hidden_states.reading(installation, plan_of(RAGGED)) as inputs:
        assert inputs["input_ids"].shape[0] == 5


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_layer_is_recomputed_as_the_text_that_it_was(reentrant: bool) -> None:
    """In the backward pass, long after the block, and after another forward."""
    model = ROWS["llama_gqa"].build().train()
    plan, installation = plan_of(ALIKE), installed(model)
    owner = installation.facts.layers.main.owner
    want = run(model, plan, packed=True)[1:]
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    with hidden_states.reading(installation, plan) as inputs:
        assert inputs["input_ids"].shape[0] == 1
        hidden = owner(**inputs, use_cache=False)[0]
    model(torch.tensor([[1, 2, 3]])).logits.sum()
    found = hidden[plan.labels != -100]
    weight = torch.randn(found.shape, generator=torch.Generator().manual_seed(0))
    (weight * found).sum().backward()
    got = [p.grad for p in model.parameters() if p.grad is not None]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_attention_that_is_not_plain_does_not_run_as_one_text() -> None:
    """Dropout that no module told of: an error, and not a text without it."""
    model = ROWS["llama_gqa"].build().train()
    installation = installed(model)
    with hidden_states.reading(installation, plan_of(ONE)) as inputs:
        model.model.layers[0].self_attn.attention_dropout = 0.5
        with pytest.raises(RuntimeError, match="which needs causal attention without dropout"):
            installation.facts.layers.main.owner(**inputs, use_cache=False)
