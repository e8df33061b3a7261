"""Finds rotary frequencies that depend on a whole text's length (transformers' ``dynamic_rope_update``)."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn


def rope_limits(owner: nn.Module) -> Iterator[tuple[str, int]]:
    """The rotary types inside a module whose frequencies change with a text's length, and the length where they do.

    Dynamic NTK scaling changes frequencies beyond the length that the model was trained on, LongRoPE beyond the
    original length. A model may have one rotary type for each type of layer.
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
