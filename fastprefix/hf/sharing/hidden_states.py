"""Runs a :class:`SharingPlan`: the hidden states that predict every scored token of its rows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from fastprefix.hf.adapters.installation import Installation
from fastprefix.hf.attention.position_ids import learned_table
from fastprefix.hf.model import probing
from fastprefix.hf.model.facts import ModelFacts
from fastprefix.hf.runtime.exactness import why_not_shareable
from fastprefix.hf.sharing.plan import SharingPlan
from fastprefix.hf.sharing.prompt_block import PromptBlock, SharedPrompt
from fastprefix.hf.sharing.shared_prompt import opened


def why_not(installation: Installation, plan: SharingPlan) -> str | None:
    """The reason why a plan's result would not be exact; None where it is."""
    selection, facts = installation.selection, installation.facts
    if selection.shared is not None or selection.chosen is not None:
        return "a block of shared_prompt or prefix_batch is open"
    if selection.provider.gated:
        return "gated prompts (ADAPTION_PROMPT) are read beside the content"
    active = selection.current()
    tokens = plan.longest
    if active is not None:
        resolved = [selection.provider.resolve(name) for name in active.distinct()]
        if any(prefix.prompt is not None for prefix in resolved):
            return "a soft prompt is attached"
        tokens += max((prefix.offset for prefix in resolved), default=0)
    return why_not_shareable(facts, tokens, {}, embedded=False)


@contextmanager
def reading(installation: Installation, plan: SharingPlan) -> Iterator[None]:
    """Let a forward of the plan's rows inside the block read its prompts.

    The model's part around all layers returns ``[B, 1 + R, d]`` there: the hidden state of each row's prompt comes
    first, so that place i predicts ``plan.labels[:, i]``.
    """
    reader, slots = installation.reader, installation.slots
    outer = None
    with ExitStack() as stack:
        if plan.beginning is not None:
            outer = PromptBlock(SharedPrompt([plan.beginning], None), reader, slots)
            stack.enter_context(opened(installation, outer))
        block = PromptBlock(SharedPrompt(plan.prompts, plan.groups), reader, slots, outer, plan.starts)
        stack.enter_context(opened(installation, block))
        stack.enter_context(installation.head.prepending())
        yield


def counts_padding(facts: ModelFacts) -> bool:
    """Whether a text padded on the left begins at the position of its column when no position ids are passed.

    Only models with absolute positions are asked: elsewhere a text means the same wherever it begins.
    """
    stack = facts.layers.main
    if learned_table(stack.owner) is None:
        return False
    ids = stack.dummy_inputs(tokens=5)["input_ids"]
    inputs = {"input_ids": torch.arange(1, 6, device=ids.device)[None], "attention_mask": torch.ones_like(ids)}
    inputs["attention_mask"][:, :2] = 0
    columns = torch.arange(5, device=ids.device)[None]

    def hidden(**positions: Tensor) -> Tensor:
        with probing.evaluating(stack.owner):
            output: Any = stack.owner(**inputs, **positions)
        found: Tensor = output[0][:, 2:]
        return found

    own = hidden()
    return torch.equal(own, hidden(position_ids=columns)) and not torch.equal(
        own, hidden(position_ids=(columns - 2).clamp(min=0))
    )
