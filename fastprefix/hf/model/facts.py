"""``ModelFacts``: everything that probing has found out about a model."""

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
    """The properties of a model, found by running it at the first ``attach`` and not changed by forwards."""

    model: Any  # a transformers PreTrainedModel
    layers: Layers
    rope_limits: tuple[tuple[str, int], ...]  # see rope_limits.py
    default_positions: DefaultPositions
    outer: OuterModules
    position_tables: tuple[nn.Module | None, ...]  # one for each stack, see position_table
    # Whether layers of a causal model read token ids besides embeddings (Gemma 3n); set once soft prompts are used.
    reads_token_ids: bool = False
    # Whether the loss accepts labels that are longer than the mask; set when a PEFT model is patched.
    loss_fits_mask: bool = True
    # Whether the logits were seen to be a function of the last hidden states alone (completion_logprobs).
    head_checked: bool = False
    # Whether prompts and rows may run as one text, which attention takes apart; None until it was tried.
    packs: bool | None = None


def position_table(model: nn.Module, stack: AttentionStack, is_decoder: bool) -> nn.Module | None:
    """The position embeddings to hook in a decoder that takes no position ids; None where no hook is needed.

    Raises:
        ValueError: the decoder's positions are absolute and cannot be moved.
    """
    if not is_decoder or not stack.causal or stack.takes_positions:
        return None
    module = position_embeddings.find_table(stack.owner)
    if module is None and position_embeddings.has_position_embeddings(stack.owner):
        owner = type(stack.owner).__name__
        got = f"{type(model).__name__}, whose positions cannot be moved: {owner} takes no position_ids"
        raise fail("model", got, "a decoder that does, or one of relative positions")
    return module
