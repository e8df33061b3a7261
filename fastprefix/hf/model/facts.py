"""Everything that is known of a model before a prefix is read in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from fastprefix.errors import fail
from fastprefix.hf.attention import position_embeddings
from fastprefix.hf.model.default_positions import DefaultPositions
from fastprefix.hf.model.layers import AttentionStack, Layers
from fastprefix.hf.model.outer_modules import OuterModules


@dataclass
class ModelFacts:
    """What a model was found to be when it was first attached to; no forward changes it."""

    model: Any  # a transformers PreTrainedModel
    layers: Layers
    rope_limits: tuple[tuple[str, int], ...]  # see rope_limits.py
    default_positions: DefaultPositions
    outer: OuterModules
    position_tables: tuple[nn.Module | None, ...]  # of each stack: the table that has to look further on
    # Whether layers of a causal model read token ids besides embeddings (Gemma 3n); found where soft prompts are used.
    reads_token_ids: bool = False
    # Whether a loss accepts labels that are longer than the mask; found where a PEFT model is patched.
    loss_fits_mask: bool = True


def position_table(model: nn.Module, stack: AttentionStack, is_decoder: bool) -> nn.Module | None:
    """The table that moves a decoder without position ids; None where there is nothing to move.

    Raises:
        ValueError: its positions are absolute and cannot be moved.
    """
    if not is_decoder or not stack.causal or stack.takes_positions:
        return None
    module = position_embeddings.find_table(stack.owner)
    if module is None and position_embeddings.has_position_embeddings(stack.owner):
        owner = type(stack.owner).__name__
        got = f"{type(model).__name__}, whose positions cannot be moved: {owner} takes no position_ids"
        raise fail("model", got, "a decoder that does, or one of relative positions")
    return module
