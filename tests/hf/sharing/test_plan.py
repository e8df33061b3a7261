"""``plan_rows`` takes batches of whole texts apart: what it plans to run, put together again, is the batch."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from fastprefix.hf.sharing.plan import IGNORED, SharingPlan, plan_groups, plan_rows

Text = tuple[list[int], list[int]]  # a prompt's tokens and a completion's


def batch(texts: list[Text], left: bool, right: bool, scored: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Whole texts ``[B, L]`` with mask and labels; ``left`` pads prompts on the left to one length, as GRPO does."""
    prompt = max(len(p) for p, _ in texts) if left else 0
    length = max((prompt or len(p)) + len(c) for p, c in texts) + 2 * right
    ids, mask = torch.full((len(texts), length), 99), torch.zeros(len(texts), length, dtype=torch.long)
    labels = torch.full_like(ids, IGNORED)
    for i, (p, c) in enumerate(texts):
        start = prompt - len(p) if left else 0
        ids[i, start : start + len(p) + len(c)] = torch.tensor(p + c)
        mask[i, start : start + len(p) + len(c)] = 1
        if scored:
            labels[i, start + len(p) : start + len(p) + len(c)] = torch.tensor(c, dtype=torch.long)
    return ids, mask, labels


def put_together(plan: SharingPlan) -> list[tuple[list[int], list[int]]]:
    """Of each row: the tokens that its scored tokens follow, and the scored tokens, in order."""
    found = []
    for row, fed, labels, group in zip(plan.rows, plan.mask, plan.labels, plan.groups.tolist(), strict=True):
        front = ([] if plan.beginning is None else plan.beginning.tolist()) + plan.prompts[group].tolist()
        wanted = [t for t in labels.tolist() if t != IGNORED]
        count = min(max(len(wanted), 1), len(row))  # the last token is fed where there is a place for it
        assert fed.tolist() == [1] * count + [0] * (len(row) - count)
        assert not wanted or row[:count].tolist() == wanted[:count]
        found.append((front, wanted))
    return found


@pytest.mark.parametrize("seed", range(40))
def test_a_plan_put_together_is_the_batch(seed: int) -> None:
    rng = random.Random(seed)
    system = [rng.randrange(1, 9) for _ in range(rng.choice([0, 0, 5]))]
    prompts = [system + [rng.randrange(1, 9) for _ in range(rng.randint(1, 6))] for _ in range(rng.randint(1, 4))]
    texts = [
        (rng.choice(prompts), [rng.randrange(1, 9) for _ in range(rng.randint(0 if seed % 3 == 0 else 1, 5))])
        for _ in range(rng.randint(1, 8))
    ]
    left = bool(seed % 2)
    ids, mask, labels = batch(texts, left, right=rng.random() < 0.5)
    plan = plan_rows(ids, mask, labels, starts=seed % 4 == 1)
    assert isinstance(plan, SharingPlan)
    assert put_together(plan) == texts
    assert plan.given == ids.numel()
    assert len(plan.prompts) == len({tuple(p) for p, _ in texts})
    if plan.starts is not None:
        first = mask.argmax(1)
        assert [plan.starts[g] for g in plan.groups.tolist()] == first.tolist()


def test_counts_and_beginnings() -> None:
    """4 questions of 3 tokens behind 20, 3 completions of 5 of each: 20 + 4 * 3 + 12 * 4 tokens run, not 12 * 28."""
    system = list(range(1, 21))
    questions = [[*system, 30 + i, 7, 8] for i in range(4)]
    texts = [(questions[i % 4], [1, 2, 3, 4, 5]) for i in range(12)]
    ids, mask, labels = batch(texts, left=True, right=False)
    plan = plan_rows(ids, mask, labels, starts=False)
    assert isinstance(plan, SharingPlan)
    assert plan.beginning is not None
    assert plan.beginning.tolist() == system
    assert (plan.given, plan.computed, plan.longest) == (12 * 28, 20 + 12 + 48, 27)
    assert plan.worthwhile
    # Nothing is split off a single prompt, and no more than leaves every prompt a token.
    rows, real = ids[:, -5:], mask[:, -5:].bool()
    assert plan_groups([torch.tensor(system)], rows, real, torch.zeros(12, dtype=torch.long)).beginning is None
    nested = [torch.tensor([*system, 5]), torch.tensor([*system, 5, 6])]
    same = plan_groups(nested, rows, real, torch.arange(12) % 2)
    assert [p.tolist() for p in same.prompts] == [[5], [5, 6]]


def test_rows_that_share_nothing_are_not_worth_a_plan() -> None:
    texts = [([i + 1, 2, 3], [4, 5]) for i in range(4)]
    plan = plan_rows(*batch(texts, left=False, right=False), starts=False)
    assert isinstance(plan, SharingPlan)
    assert not plan.worthwhile


@pytest.mark.parametrize(
    ("mask", "labels", "reason"),
    [
        ([[1, 1, 0, 1, 1]], [[-100, -100, -100, 4, 5]], "gaps"),
        ([[0, 1, 1, 1, 1]], [[-100, 2, 3, 4, 5]], "no token in front"),
        ([[0, 0, 0, 0, 0]], [[-100] * 5], "no token in front"),
        ([[1, 1, 1, 1, 0]], [[-100, -100, 3, 4, 5]], "padding is scored"),
    ],
)
def test_what_cannot_be_taken_apart_says_why(mask: list[list[int]], labels: list[list[int]], reason: str) -> None:
    plan = plan_rows(torch.tensor([[1, 2, 3, 4, 5]]), torch.tensor(mask), torch.tensor(labels), starts=False)
    assert isinstance(plan, str)
    assert reason in plan
