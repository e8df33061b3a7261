"""Rotary frequencies that depend on the length of a whole text (transformers' ``dynamic_rope_update``)."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn


def rope_limits(owner: nn.Module) -> Iterator[tuple[str, int]]:
    """Kinds of rotary frequencies inside a module that depend on a text's length, and from which length on.

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
