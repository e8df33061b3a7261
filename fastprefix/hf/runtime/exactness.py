"""Where a prompt computed once is not what it would be in front of every row: it has to be concatenated there.

Sharing needs that a prompt's keys and values depend on the prompt alone: not on what follows it, nor on how long that
is, nor on chance.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from fastprefix.hf.adapters.installation import Installation


def inexact(state: Installation, tokens: int, kwargs: dict[str, Any], embedded: bool = True) -> str | None:
    """Why a prompt of so many tokens must be concatenated in a forward to be exact; None where it may be shared.

    ``embedded``: whether it is embeddings, and no tokens with ids.
    """
    main = state.layers.main
    if not main.causal:
        return f"{type(main.owner).__name__} is bidirectional: its prompt sees the row"
    if embedded and state.reads_token_ids:
        return "its layers read token ids beside their embeddings, which a prompt has not"
    if (name := _active_dropout(main.owner)) is not None:
        return f"dropout is active in the model ({name}): every row draws its own"
    return outgrown(state, tokens + _row_tokens(kwargs), tokens + _last_position(state, kwargs))


def outgrown(state: Installation, tokens: int, last_position: int = 0) -> str | None:
    """Why a text of so many tokens, its prompt included, is too long for a shared prompt; None where it is not."""
    window = state.layers.window
    if window is not None and tokens > window:
        return f"a layer has a window of {window} tokens: rows outgrow it, and a prompt in their place would too"
    for kind, limit in state.rotary_limits:
        if max(tokens, last_position) >= limit:
            first = "its first ones included"
            return f"the model's rotary frequencies ({kind}) change for a whole text of {limit} tokens, {first}"
    return None


def _row_tokens(kwargs: dict[str, Any]) -> int:
    """Tokens of a forward's rows, those in its cache included."""
    source = kwargs.get("input_ids") if kwargs.get("input_ids") is not None else kwargs.get("inputs_embeds")
    past = kwargs.get("past_key_values")
    return (0 if source is None else int(source.shape[1])) + (0 if past is None else int(past.get_seq_length()))


def _last_position(state: Installation, kwargs: dict[str, Any]) -> int:
    """One more than the greatest of a forward's own position ids; 0 where they are not asked for."""
    ids = kwargs.get("position_ids")
    asked = state.rotary_limits and not torch.compiler.is_compiling()
    return int(ids.max()) + 1 if asked and isinstance(ids, Tensor) and ids.numel() else 0


def rotary_limits(owner: nn.Module) -> Iterator[tuple[str, int]]:
    """Kinds of rotary frequencies that depend on a text's length (transformers' ``dynamic_rope_update``), from where.

    Dynamic NTK scaling changes them beyond the length that the model was trained on, LongRoPE beyond the original one;
    a model may have a kind for each type of its layers.
    """
    for module in owner.modules():
        kinds = getattr(module, "rope_type", None)
        named = kinds if isinstance(kinds, dict) else {None: kinds}
        for layer_type, kind in named.items():
            if not isinstance(kind, str) or not ("dynamic" in kind or kind == "longrope"):
                continue
            longest = getattr(module, "original_max_seq_len", None)
            if kind == "longrope":
                parameters = getattr(module.config, "rope_parameters", None) or {}
                parameters = parameters if layer_type is None else parameters.get(layer_type, {})
                longest = parameters.get("original_max_position_embeddings", longest)
            yield kind, int(longest or 0)


def _active_dropout(owner: nn.Module) -> str | None:
    """The name of a module that drops something in this mode."""
    for name, module in owner.named_modules():
        if not module.training:
            continue
        if isinstance(module, nn.modules.dropout._DropoutNd):
            if module.p > 0.0:
                return name
            continue
        for attribute, value in vars(module).items():
            if isinstance(value, float) and value > 0.0 and "drop" in attribute:
                return f"{name}.{attribute}"
    return None
