"""a^n b^n: how many prompts there are of each kind, what completes them, and that the experiment runs."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from benches.papers.claims import extrapolation
from benches.papers.tasks import anbn
from fastprefix.data import IGNORE_INDEX
from tests.papers.checks import check


def test_how_many_prompts_there_are() -> None:
    inside, outside = anbn.prompts()
    assert (len(inside), len(outside), int(anbn.balanced(outside).sum())) == (5, 251, 69)


def test_prompts_are_trained_on_or_tested() -> None:
    _, outside = anbn.prompts()
    halves = [{*map(tuple, half.tolist())} for half in anbn.halves(outside)]
    assert not halves[0] & halves[1]
    assert halves[0] | halves[1] == {*map(tuple, outside.tolist())}
    assert abs(len(halves[0]) - len(halves[1])) == 1


def test_completions() -> None:
    a, b = anbn.A, anbn.B
    assert anbn.completed([b, a, a], "extrapolation") == [b, a, a, b]
    assert anbn.completed([b, b, a, b], "extrapolation") == [b, b, a, b, a, a]
    _, outside = anbn.prompts()
    for prompt in outside.tolist():
        for kind, balanced in (("extrapolation", True), ("adversarial", False)):
            whole = torch.tensor([anbn.completed(prompt, kind)])
            assert anbn.balanced(whole).item() is balanced
            assert anbn.a_before_b(whole[:, anbn.PROMPT :]).item()


def test_the_language() -> None:
    ids, labels = anbn.language(6)
    assert [[x for x in row if x != IGNORE_INDEX] for row in labels.tolist()] == [
        [anbn.A] * n + [anbn.B] * n + [anbn.END] for n in (1, 2, 3)
    ]
    assert (ids[:, 0] == anbn.START).all()
    assert anbn.entropy(6) == pytest.approx(3 * math.log(3) / (3 + 5 + 7))


def test_a_prompt_has_no_loss() -> None:
    _, outside = anbn.prompts()
    ids, labels = next(anbn.mixed_batches(outside, "extrapolation", 32, 1, 4, seed=0))
    assert len(ids) == 16 + 4
    assert (labels[16:, : anbn.PROMPT + 1] == IGNORE_INDEX).all()
    assert (labels[16:, anbn.PROMPT + 1] != IGNORE_INDEX).all()


@pytest.mark.parametrize("full", [False, True], ids=["small", "full"])
def test_the_experiment_runs(full: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = extrapolation.SETTINGS[full]
    # The models here have not learned to end: few prompts, and few letters behind them.
    size = dataclasses.replace(setting.size, letters=18)
    inside, outside = anbn.prompts()
    monkeypatch.setattr(anbn, "prompts", lambda: (inside, outside[::8]))
    monkeypatch.setitem(extrapolation.SETTINGS, full, dataclasses.replace(setting, size=size, base=1, tune=1))
    check(extrapolation.EXPERIMENT, extrapolation.run(0, full))
