"""Packed rows: several documents in one row, recognised by jumping position ids, which must not see each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fastprefix.errors import fail
from fastprefix.hf.attention import masks

_AXES_AND_TEXT = 4  # Qwen2-VL's: a text's positions, then time, height and width


def separate_documents(
    kwargs: dict[str, Any], arguments: Sequence[str], model: str, keeps_state: bool, training: bool
) -> None:
    """Set up a causal forward so that its masks keep packed documents apart.

    transformers detects packed documents only in a forward without a cache, and not in every model.

    Args:
        kwargs: the forward's keyword arguments; ``use_cache`` is set to False where rows are packed.
        arguments: the argument names of the forward.
        model: name of the model's class, for errors.
        keeps_state: whether some of the model's layers carry a state from token to token (hybrids).
        training: whether the module is in training mode.

    Raises:
        ValueError: rows are packed, or may be, and a layer would carry its state past a document's end.
    """
    takes_cache = "use_cache" in arguments
    if torch.compiler.is_compiling():
        # The ids' values cannot be read. Ids without a mask may be packed; training then needs no cache.
        may_be = kwargs.get("position_ids") is not None and kwargs.get("attention_mask") is None
        if may_be and keeps_state and kwargs.get("past_key_values") is None:
            got = "ids that may be those of packed documents, which torch.compile cannot read"
            expected = f"an attention_mask beside them: layers of {model} carry a state past a document's end"
            raise fail("position_ids", got, expected)
        if training and takes_cache and may_be and not kwargs.get("use_cache"):
            kwargs["use_cache"] = False
        return
    boundary = documents(kwargs)
    if boundary is not None and keeps_state:
        expected = f"one document a row: layers of {model} carry a state past its end"
        raise fail("position_ids", "packed documents (they jump)", expected)
    masks.requested.boundary = boundary
    if boundary is not None and takes_cache:
        kwargs["use_cache"] = False


def documents(kwargs: dict[str, Any]) -> tuple[int, int] | None:
    """Row and first position of a document that follows another in its row; None where there is none.

    A row is packed when its position ids jump and the forward has neither a mask nor a cache. Positions on several axes
    ``[3, B, S]`` are those of images and videos, which always jump; ``[4, B, S]`` begins with the text's positions.
    """
    ids = kwargs.get("position_ids")
    if ids is None or kwargs.get("attention_mask") is not None or kwargs.get("past_key_values") is not None:
        return None
    if ids.dim() == 3:
        if ids.shape[0] != _AXES_AND_TEXT:
            return None
        ids = ids[0]
    jumps = (ids.diff(dim=-1) != 1).nonzero()
    return (int(jumps[0, 0]), int(jumps[0, -1]) + 1) if len(jumps) else None
