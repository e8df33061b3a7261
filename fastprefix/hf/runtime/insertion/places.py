"""Finds the place of a soft prompt inside each row of a forward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastprefix.errors import fail
from fastprefix.hf.model.next_token_loss import IGNORED
from fastprefix.hf.runtime.forward_context import InsertedPlaces, Insertion
from fastprefix.prefixes.prompt import Place


def find_places(insertion: Insertion, kwargs: dict[str, Any], mask: Tensor | None) -> InsertedPlaces:
    """Where the prompt stands in the rows of a forward.

    Args:
        insertion: the prompt and its place in words.
        kwargs: the forward's keyword arguments.
        mask: ``[B, S]`` padding, or None.

    Raises:
        ValueError: a row has no place for the prompt, or several.
    """
    tokens = insertion.prompt.shape[1]
    if insertion.place == "after":
        start = _after(kwargs, mask, insertion.labels)
        return InsertedPlaces(last=start - 1, start=start, extra=tokens)
    at = is_marker(insertion.place, kwargs.get("input_ids"))
    expected = f"the marker {insertion.place}, where the prompt stands, exactly once in each row"
    require(at.sum(1) == 1, "input_ids", "a row with another number of them", expected)
    start = at.int().argmax(1)
    return InsertedPlaces(last=start, start=start, extra=tokens - 1)


def is_marker(place: Place, ids: Any) -> Tensor:
    """``[B, S]`` bool, whether a token is the marker."""
    if not isinstance(ids, Tensor):
        raise fail("input_ids", "None", f"token ids: the prompt stands at the marker {place}")
    return ids.eq(int(place))


def _after(kwargs: dict[str, Any], mask: Tensor | None, labels: Tensor | None) -> Tensor:
    """``[B]``, for each row the column of its first labelled token, or the one after its last token."""
    ids, embeds = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
    source = embeds if ids is None else ids
    if source is None:
        raise fail("input_ids", "neither input_ids nor inputs_embeds", "one of them")
    batch, length = source.shape[:2]
    real = source.new_ones(batch, length, dtype=torch.long) if mask is None else mask.to(source.device).long()
    start = length - real.flip(1).argmax(1)
    if labels is not None:
        counted = (labels != IGNORED).to(source.device)
        start = torch.where(counted.any(1), counted.int().argmax(1), start)
    given = (start > 0) & (real.gather(1, (start - 1).clamp(min=0)[:, None])[:, 0] > 0)
    name, got = (
        ("input_ids", "a row without a token") if labels is None else ("labels", "a row labelled from its start")
    )
    require(given, name, got, f"a token in front of the prompt (place='after'), with label {IGNORED}")
    return start


def require(holds: Tensor, name: str, got: str, expected: str) -> None:
    """Raise ValueError unless a condition ``[B]`` holds in all rows; in a compiled graph an assertion of the device."""
    if torch.compiler.is_compiling():
        torch._assert_async(holds.all(), str(fail(name, got, expected)))
    elif not bool(holds.all()):
        raise fail(name, got, expected)


def refuse_ambiguous(place: Place, kwargs: dict[str, Any], trains: bool) -> None:
    """Raise ValueError for a forward of whole rows without labels, which does not say where its new tokens begin.

    Args:
        place: of the prompt; a marker says it itself.
        kwargs: the keyword arguments of a language model's forward.
        trains: whether the forward computes gradients in training mode.
    """
    if place != "after" or kwargs.get("labels") is not None:
        return
    keep = kwargs.get("logits_to_keep")
    if isinstance(keep, Tensor) or (keep or 0) > 1:
        expected = "labels, or the last place alone: place='after' is after the last token here"
        raise fail("logits_to_keep", "several places" if isinstance(keep, Tensor) else keep, expected)
    if kwargs.get("use_cache") is False:
        expected = "a cache or labels: without them nothing says where the new tokens begin (place='after')"
        raise fail("use_cache", False, expected)
    if trains:
        expected = "labels, of which the first one that counts tells where the prompt is (place='after')"
        raise fail("labels", None, expected)
