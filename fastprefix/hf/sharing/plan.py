"""Finds what the rows of a batch share: whole prompts by their tokens, and a beginning that all prompts have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

IGNORED = -100  # label of a token that is not scored
# A level of sharing has to save this factor of tokens: it is a forward more, with its own launches and Python.
WORTH = 1.1


@dataclass(frozen=True)
class SharingPlan:
    """The tokens of a batch as a tree: a beginning, prompts behind it, and rows behind those.

    Attributes:
        beginning: ``[C]`` token ids that stand in front of every prompt; None without any.
        prompts: N prompts of ``[P_n]`` token ids, without the beginning.
        starts: position of each prompt's first token; None where it is the one behind the beginning.
        groups: ``[B]``, the prompt of each row.
        rows: ``[B, R]`` token ids to run behind the prompts, padded on the right.
        mask: ``[B, R]``, 1 for tokens and 0 for padding.
        labels: ``[B, 1 + R]``: the token that each row's prompt predicts, then those that its tokens predict;
            ``IGNORED`` where none is scored.
        given: number of tokens that the batch has, padding included.
        length: tokens of a row of the batch, padding included.
    """

    beginning: Tensor | None
    prompts: list[Tensor]
    starts: list[int] | None
    groups: Tensor
    rows: Tensor
    mask: Tensor
    labels: Tensor
    given: int
    length: int

    @property
    def computed(self) -> int:
        """Number of tokens that run through the model, padding included."""
        first = 0 if self.beginning is None else len(self.beginning)
        return first + len(self.prompts) * max(len(prompt) for prompt in self.prompts) + self.rows.numel()

    @property
    def longest(self) -> int:
        """Number of tokens of the longest row with everything in front of it."""
        first = 0 if self.beginning is None else len(self.beginning)
        return first + max(len(prompt) for prompt in self.prompts) + self.rows.shape[1]

    @property
    def worthwhile(self) -> bool:
        """Whether rows share enough tokens to pay for the forward more."""
        shares = len(self.prompts) < len(self.rows) or self.beginning is not None
        return shares and self.given >= WORTH * self.computed


def plan_rows(input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor, starts: bool) -> SharingPlan | str:
    """Take a batch of whole texts apart. A row's prompt is all that stands in front of its first scored token.

    Args:
        input_ids: ``[B, L]`` token ids, padded on either side.
        attention_mask: ``[B, L]``, 1 for tokens and 0 for padding; None without padding.
        labels: ``[B, L]``, the ids of the tokens that are scored, ``IGNORED`` for all others.
        starts: whether a text padded on the left begins at the position of its column, not at the first.

    Returns:
        The plan, or why the rows cannot be taken apart.
    """
    size, length = input_ids.shape
    columns = torch.arange(length, device=input_ids.device)
    real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    scored = (labels != IGNORED) & real
    first = real.to(torch.uint8).argmax(1)  # [B], column of the first token
    count = real.sum(1)
    begins = torch.where(scored.any(1), scored.to(torch.uint8).argmax(1), first + count)  # of what is scored
    ends = torch.where(scored.any(1), length - scored.flip(1).to(torch.uint8).argmax(1), begins)
    inside = (columns >= first[:, None]) & (columns < (first + count)[:, None])
    # One transfer from the device for all questions.
    bad, unprompted, behind = torch.stack(
        [(inside != real).any(), (begins <= first).any(), ((labels != IGNORED) & ~real).any()]
    ).tolist()
    if bad:
        return "the attention mask has gaps inside a row"
    if behind:
        return "padding is scored"
    if unprompted:
        return "a row has no token in front of the first one that is scored"
    lengths = begins - first
    longest, widest = int(lengths.max()), int((ends - begins).max())
    at = first[:, None] + torch.arange(longest, device=columns.device)
    prompts = input_ids.gather(1, at.clamp(max=length - 1)).masked_fill(at >= begins[:, None], -1)
    key = torch.cat([first[:, None], prompts], 1) if starts else prompts
    distinct, groups = torch.unique(key, dim=0, return_inverse=True)
    sizes = distinct[:, int(starts) :].ge(0).sum(1).tolist()
    width = max(widest - 1, 1)  # the last scored token predicts nothing
    at = begins[:, None] + torch.arange(width + 1, device=columns.device)
    within = at < ends[:, None]
    at = at.clamp(max=length - 1)
    own = labels.gather(1, at).masked_fill(~within, IGNORED)
    mask = within[:, :width]
    rows = input_ids.gather(1, at[:, :width]).masked_fill(~mask, 0)
    # A row without a token attends to its first padding token, as a row of nothing has no place to stand.
    mask = mask.long()
    mask[:, 0] = 1
    plan = SharingPlan(
        beginning=None,
        prompts=[row[int(starts) :][:n] for row, n in zip(distinct, sizes, strict=True)],
        starts=distinct[:, 0].tolist() if starts and bool(first.any()) else None,
        groups=groups.cpu(),
        rows=rows,
        mask=mask,
        labels=own,
        given=size * length,
        length=length,
    )
    return with_beginning(plan)


def plan_groups(prompts: Sequence[Tensor], rows: Tensor, mask: Tensor, groups: Tensor) -> SharingPlan:
    """The plan for prompts and their completions.

    Args:
        prompts: N prompts of ``[P_n]`` token ids.
        rows: ``[B, R]`` completions, padded on the right.
        mask: ``[B, R]`` bool, which of their tokens are real.
        groups: ``[B]``, the prompt of each row.
    """
    width = max(rows.shape[1] - 1, 1)
    labels = rows.masked_fill(~mask, IGNORED)
    labels = torch.cat([labels, labels.new_full((len(labels), 1 + width - labels.shape[1]), IGNORED)], 1)
    used, chosen = groups.unique(return_inverse=True)
    fed = mask[:, :width].long()
    fed[:, 0] = 1
    length = max(len(prompt) for prompt in prompts) + rows.shape[1]
    kept = [prompts[n] for n in used.tolist()]
    return with_beginning(
        SharingPlan(
            beginning=None,
            prompts=kept,
            starts=None,
            groups=chosen,
            rows=rows[:, :width].masked_fill(fed == 0, 0),
            mask=fed,
            labels=labels,
            given=len(rows) * length,
            length=length,
        )
    )


def with_beginning(plan: SharingPlan) -> SharingPlan:
    """Split off the tokens that all prompts begin with, where that saves enough; each prompt keeps one at least."""
    if len(plan.prompts) < 2 or plan.starts is not None:
        return plan
    shortest = min(len(prompt) for prompt in plan.prompts)
    heads = torch.stack([prompt[: shortest - 1] for prompt in plan.prompts])  # [N, shortest - 1]
    common = int((heads == heads[:1]).all(0).long().cumprod(0).sum())
    if common == 0:
        return plan
    prompts = [prompt[common:] for prompt in plan.prompts]
    split = replace(plan, beginning=plan.prompts[0][:common], prompts=prompts)
    return split if plan.computed >= WORTH * split.computed else plan
