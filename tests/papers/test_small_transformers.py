"""The experiments on small transformers: their tasks, the sizes that they compare, and that each of them runs."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from benches.papers.claims import combining, eliciting, resorting
from benches.papers.tasks.sequence_tasks import FULL, MIX, SMALL, TASKS
from benches.papers.tasks.small_transformer import (
    Shape,
    attention_map,
    build,
    exact_match,
    ids_of,
    prefixed,
    trainable,
    with_lora,
)
from fastprefix import analysis
from tests.papers.checks import check

HAND = torch.tensor([[3, 0, 3, 1, 3, 0]])


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        ("ascending", [0, 0, 1, 3, 3, 3]),
        ("descending", [3, 3, 3, 1, 0, 0]),
        ("add 1", [4, 1, 4, 2, 4, 1]),
        ("add 2", [5, 2, 5, 3, 5, 2]),
        ("ascending + 1", [1, 1, 2, 4, 4, 4]),
        ("double histogram", [3, 2, 3, 1, 3, 2]),
    ],
)
def test_a_task_by_hand(task: str, expected: list[int]) -> None:
    assert TASKS[task](HAND).tolist() == [expected]


@pytest.mark.parametrize("data", [SMALL, FULL], ids=["small", "full"])
def test_outputs_are_in_the_vocabulary(data: Any) -> None:
    for task in TASKS:
        x, y = data.tests(task, 500)
        assert x.shape == y.shape == (500, data.length)
        assert x.max() == data.digits - 1 and y.min() >= 0
        if task != "double histogram":
            assert y.max() < data.vocabulary


def test_trained_and_tested_inputs_are_disjoint() -> None:
    trained = torch.cat([x for x, _ in SMALL.batches(MIX, 40, 64, seed=0)])
    tested, _ = SMALL.tests("ascending", 1000)
    assert not {*map(tuple, trained.tolist())} & {*map(tuple, tested.tolist())}


def test_a_batch_is_a_mix_of_its_tasks() -> None:
    ((x, y),) = SMALL.batches(MIX, 1, 64, seed=0)
    matches = torch.stack([(TASKS[task](x) == y).all(1) for task in MIX])
    assert matches.any(0).all() and matches.any(1).all()


def test_exact_match_is_that_of_greedy_decoding() -> None:
    model = build(Shape(1, 1), SMALL, seed=0).eval()
    x, _ = SMALL.tests("ascending", 8)
    ids = x
    for _ in range(SMALL.length):
        ids = torch.cat([ids, model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    written = ids[:, SMALL.length :]
    assert exact_match(model, (x, written)) == 100.0
    assert exact_match(model, (x, (written + 1) % SMALL.vocabulary)) == 0.0


@pytest.mark.parametrize(("rank", "tokens"), combining.TOKENS_OF_RANK.items())
@pytest.mark.parametrize("shape", [setting.shape for setting in combining.SETTINGS.values()], ids=["small", "full"])
def test_a_prefix_and_lora_of_as_many_numbers(shape: Shape, rank: int, tokens: int) -> None:
    model = build(shape, SMALL, seed=0)
    adapted = trainable(with_lora(model, rank, 0, combining.ALL_MAPS))
    with prefixed(model, tokens, seed=0) as prefix:
        assert trainable(prefix) == adapted


def test_the_map_of_attention_is_the_models() -> None:
    model = build(Shape(1, 4), SMALL, seed=0).eval()
    ids = ids_of(SMALL.tests("ascending", 2))
    model.set_attn_implementation("eager")
    expected = model(input_ids=ids, use_cache=False, output_attentions=True).attentions[0]
    torch.testing.assert_close(attention_map(model, ids), expected)
    model.set_attn_implementation("sdpa")
    with prefixed(model, 3, seed=0) as prefix:
        keys = next(x for name, x in prefix.named_parameters() if name.endswith(".k"))
        share = attention_map(model, ids, keys)[..., :3].sum(-1)
        torch.testing.assert_close(share, analysis.prefix_mass(model, {"input_ids": ids}).mass[0])


@pytest.mark.parametrize("full", [False, True], ids=["small", "full"])
@pytest.mark.parametrize("claim", [resorting, eliciting, combining], ids=lambda claim: claim.EXPERIMENT.name)
def test_an_experiment_runs(claim: Any, full: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = claim.SETTINGS[full]
    short = dataclasses.replace(setting, steps=dict.fromkeys(setting.steps, 1), tests=16)
    monkeypatch.setitem(claim.SETTINGS, full, short)
    monkeypatch.setattr(claim, "ROWS", 4)
    check(claim.EXPERIMENT, claim.run(0, full))
