"""Finds a model's first position when no position ids are passed, and whether passing them has any effect."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastprefix.hf.attention.position_ids import learned_table
from fastprefix.hf.model import layers as model_layers
from fastprefix.hf.model import probing


class DefaultPositions(NamedTuple):
    """How a stack counts positions by default."""

    first: int = 0  # position of a row's first token (fairseq's sinusoids: the padding token's id plus 1)
    moved: bool = True  # whether ``position_ids`` move tokens (CSM's depth decoder ignores them)


def find(model: Any, stack: model_layers.AttentionStack) -> DefaultPositions:
    """Run a stack on a few tokens, with position ids and without, and compare the outputs.

    Models like RoBERTa need no run: their learned table tells the first position (``position_ids.learned_table``).
    """
    table = learned_table(stack.owner)
    behind = table is not None and table.padding_idx is not None
    if not stack.takes_positions or stack.extra_inputs or stack.main_input != "input_ids" or behind:
        return DefaultPositions()
    inputs = stack.dummy_inputs(tokens=3)
    token = getattr(model.config.get_text_config(), "pad_token_id", None)
    padding = token if isinstance(token, int) else 0
    counted = torch.arange(3, device=inputs["input_ids"].device)[None]
    inputs["input_ids"] = 1 + padding + counted  # distinct ids, none of them padding

    def hidden(position_ids: Tensor | None) -> Tensor:
        given = {} if position_ids is None else {"position_ids": position_ids}
        with probing.evaluating(stack.owner):
            x = stack.owner(**inputs, **given)[0]
        assert isinstance(x, Tensor)
        return x

    own, from_zero = hidden(None), hidden(counted)
    # Compared bit for bit: the same positions take the same steps, and in half precision rounding hides much else.
    if torch.equal(from_zero, hidden(counted + torch.tensor([0, 0, 3], device=counted.device))):
        return DefaultPositions(moved=False)
    for first in (0, 1, 1 + padding):
        if torch.equal(own, from_zero if first == 0 else hidden(counted + first)):
            return DefaultPositions(first)
    return DefaultPositions()
