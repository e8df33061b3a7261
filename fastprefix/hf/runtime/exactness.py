"""Decides whether a prompt may be computed once for all rows, or must be concatenated to each row to be exact.

Sharing is exact where a prompt's keys and values depend on the prompt alone: not on the text that follows it, nor on
the length of that text, nor on dropout.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastprefix.hf.model.facts import ModelFacts
from fastprefix.prefixes.encoders.prompt_encoder import BidirectionalLSTM


def why_not_shareable(facts: ModelFacts, tokens: int, kwargs: dict[str, Any], embedded: bool = True) -> str | None:
    """The reason why a prompt must be concatenated in a forward to be exact; None where it may be shared.

    Args:
        facts: about the model.
        tokens: number of tokens of the prompt.
        kwargs: the forward's keyword arguments.
        embedded: whether the prompt is embeddings, without token ids.
    """
    main = facts.layers.prompted
    if not main.causal:
        return f"{type(main.owner).__name__} is bidirectional: its prompt sees the row"
    if embedded and facts.reads_token_ids:
        return "its layers read token ids beside their embeddings, which a prompt has not"
    if (name := _active_dropout(main.owner)) is not None:
        return f"dropout is active in the model ({name}): every row draws its own"
    return why_too_long(facts, tokens + _row_tokens(kwargs), tokens + _last_position(facts, kwargs))


def why_too_long(facts: ModelFacts, tokens: int, last_position: int = 0) -> str | None:
    """The reason why ``tokens`` tokens, prompt included, are too many to share the prompt; None where they are not."""
    window = facts.layers.window
    if window is not None and tokens > window:
        return f"a layer has a window of {window} tokens: rows outgrow it, and a prompt in their place would too"
    for kind, limit in facts.rope_limits:
        if max(tokens, last_position) >= limit:
            first = "its first ones included"
            return f"the model's rotary frequencies ({kind}) change for a whole text of {limit} tokens, {first}"
    return None


def _row_tokens(kwargs: dict[str, Any]) -> int:
    """Number of tokens of a forward's rows, including those in its cache."""
    source = kwargs.get("input_ids") if kwargs.get("input_ids") is not None else kwargs.get("inputs_embeds")
    past = kwargs.get("past_key_values")
    return (0 if source is None else int(source.shape[1])) + (0 if past is None else int(past.get_seq_length()))


def _last_position(facts: ModelFacts, kwargs: dict[str, Any]) -> int:
    """One more than the greatest of the position ids passed to a forward; 0 where they need not be known."""
    ids = kwargs.get("position_ids")
    asked = facts.rope_limits and not torch.compiler.is_compiling()
    return int(ids.max()) + 1 if asked and isinstance(ids, Tensor) and ids.numel() else 0


def _active_dropout(owner: nn.Module) -> str | None:
    """The name of a module whose dropout, or a router's noise, is active in the current mode; None without one."""
    for name, module in owner.named_modules():
        # A prompt's encoder draws its dropout once for all rows, as it runs once.
        if not module.training or isinstance(module, BidirectionalLSTM):
            continue
        if isinstance(module, nn.modules.dropout._DropoutNd):
            if module.p > 0.0:
                return name
            continue
        for attribute, value in vars(module).items():
            if isinstance(value, float) and value > 0.0 and ("drop" in attribute or "jitter_noise" in attribute):
                return f"{name}.{attribute}"
    return None
