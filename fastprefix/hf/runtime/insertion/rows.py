"""Puts a soft prompt's embeddings into the rows of a forward, and takes its places out of the output."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastprefix.errors import fail
from fastprefix.hf.attention import masks
from fastprefix.hf.attention.position_ids import check_table
from fastprefix.hf.model.facts import ModelFacts
from fastprefix.hf.runtime.cache_origin import cache_of
from fastprefix.hf.runtime.forward_context import InsertedPlaces, Insertion
from fastprefix.hf.runtime.insertion.places import find_places, is_marker, require

_ATTRIBUTE = "_fastprefix_inserted"
_CHANGED = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "token_type_ids")


def go_on(insertion: Insertion, kwargs: dict[str, Any], first: int) -> bool:
    """Whether a forward goes on from a cache that holds the prompt; its mask and positions are extended then.

    Args:
        insertion: the prompt.
        kwargs: the forward's keyword arguments, changed in place.
        first: position of a text's first token in this model.

    Raises:
        ValueError: the cache is static, or the forward's tokens do not follow those in the cache.
    """
    cache = kwargs.get("past_key_values")
    if cache is not None and getattr(cache, "is_compileable", False):
        expected = "a dynamic one: the prompt stands inside the rows, which are longer than their text"
        raise fail("past_key_values", f"a static cache ({type(cache).__name__})", expected)
    past = 0 if cache is None else int(cache.get_seq_length())
    if not past:
        return False
    places = getattr(cache, _ATTRIBUTE, None)
    ids = kwargs.get("input_ids")
    batch, tokens = (kwargs["inputs_embeds"] if ids is None else ids).shape[:2]
    if not isinstance(places, InsertedPlaces) or len(places.last) != batch:
        raise fail("past_key_values", "a cache of other rows", "the one that a forward with this prompt has filled")
    if insertion.place == "after" and tokens > 1:
        expected = "one token at a time: place='after' is in front of the first new token. Start a new cache"
        raise fail("past_key_values", f"a cache that holds the prompt, and {tokens} tokens", expected)
    if insertion.place != "after" and ids is not None:
        again = is_marker(insertion.place, ids).any(1)
        got = f"the marker {insertion.place} after the prompt"
        require(~again, "input_ids", got, "none: suppress_tokens keeps generate from it")
    text = past - places.extra + tokens  # how many tokens of text there are
    mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
    if mask is not None:
        if not (isinstance(mask, Tensor) and mask.dim() == 2):
            raise fail("attention_mask", "a mask made in advance", "[B, S] padding: the prompt is inside the rows")
        if mask.shape[1] != text:
            raise fail(
                "attention_mask", f"{mask.shape[1]} columns", f"{text}, as many as tokens, the prompt's left out"
            )
        kwargs["attention_mask"] = _fill(mask, mask.new_ones(batch, 1), places, insertion.prompt.shape[1])
    if positions is not None:
        if mask is None and int(positions.max()) + 1 - text not in (0, first):
            expected = f"up to {text - 1}: the cache holds {text - tokens} tokens of text, and the prompt's"
            raise fail("position_ids", f"{int(positions.max())}", expected)
        kwargs["position_ids"] = positions + places.extra
    return True


def insert(
    facts: ModelFacts, insertion: Insertion, kwargs: dict[str, Any], table: nn.Embedding | None, outer_made_masks: bool
) -> None:
    """Put a prompt into the rows of a forward whose position ids are set already.

    Args:
        facts: about the model.
        insertion: the prompt; its ``places`` are set.
        kwargs: the forward's keyword arguments, changed in place.
        table: the model's learned positions, if it has some.
        outer_made_masks: whether an outer module has already made the masks in ``kwargs``.
    """
    mask = kwargs.get("attention_mask")
    if outer_made_masks or (mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2)):
        raise fail("attention_mask", "a mask made in advance", "[B, S] padding: the prompt is put into the rows")
    if masks.requested.boundary is not None:
        expected = "one document a row: the prompt is put into the rows"
        raise fail("position_ids", "packed documents (they jump)", expected)
    places = insertion.places = find_places(insertion, kwargs, mask)
    ids, embeds = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
    if embeds is None:
        assert ids is not None
        if insertion.place != "after":
            ids = ids.masked_fill(is_marker(insertion.place, ids), 0)  # its id may be beyond the table's
        embeds = facts.model.get_input_embeddings()(ids)
    batch, length = embeds.shape[:2]
    for name, x in kwargs.items():
        if name not in _CHANGED and isinstance(x, Tensor) and tuple(x.shape[:2]) == (batch, length):
            raise fail(name, "a value for each token", "none: the prompt, which is put into the rows, has none")
    prompt = insertion.prompt.to(embeds.dtype).expand(batch, -1, -1)
    tokens = prompt.shape[1]
    kwargs["input_ids"], kwargs["inputs_embeds"] = None, _fill(embeds, prompt, places, tokens)
    if mask is not None:
        kwargs["attention_mask"] = _fill(mask, mask.new_ones(batch, 1), places, tokens)
    if kwargs.get("token_type_ids") is not None:
        types = kwargs["token_type_ids"]
        kwargs["token_type_ids"] = _fill(types, types.new_zeros(batch, 1), places, tokens)
    positions = _positions(kwargs["position_ids"], batch, places, tokens)
    check_table(positions, table)
    kwargs["position_ids"] = positions


def _positions(positions: Tensor, batch: int, places: InsertedPlaces, tokens: int) -> Tensor:
    """Positions of rows with the prompt in them, ``[..., B, S + extra]``, from those of their text."""
    positions = positions.expand(*positions.shape[:-2], batch, -1)
    drop = tokens - places.extra
    start = places.start[:, None]
    index = (places.start - 1 + drop).expand(positions.shape[:-1])[..., None]
    first = positions.gather(-1, index) + 1 - drop  # of the prompt's first token
    own = first + torch.arange(tokens, device=positions.device)
    columns = torch.arange(positions.shape[-1], device=positions.device)
    moved = positions + places.extra * (columns >= start + drop)
    return _fill(moved, own, places, tokens)


def _fill(text: Tensor, prompt: Tensor, places: InsertedPlaces, tokens: int) -> Tensor:
    """Rows ``[..., B, S + extra(, d)]`` from those of the text and those of the prompt (P places, or one for all).

    Positions may have leading axes; embeddings have a trailing one.
    """
    hidden = text.is_floating_point() and text.dim() == 3
    axis = 1 if hidden else text.dim() - 1
    length, start = text.shape[axis], places.start[:, None]
    columns = torch.arange(length + places.extra, device=text.device)[None]
    inside = (columns >= start) & (columns < start + tokens)
    behind = torch.where(columns < start, columns, columns - places.extra)
    of_prompt = columns - start if prompt.shape[axis] > 1 else torch.zeros_like(columns)
    index = torch.where(inside, length + of_prompt, behind)  # [B, S + extra]
    return torch.cat([text, prompt], axis).gather(axis, _like(index, text, axis))


def _like(index: Tensor, x: Tensor, axis: int) -> Tensor:
    """An index ``[B, T]`` expanded to the other axes of a tensor."""
    if axis == 1 and x.dim() == 3:
        return index[..., None].expand(-1, -1, x.shape[2])
    return index.expand(*x.shape[:-1], -1)


def cut(output: Any, insertion: Insertion) -> Any:
    """A forward's output at the places of the text, ``[B, S, d]``; its cache remembers where the prompt is."""
    places = insertion.places
    assert places is not None
    if (cache := cache_of(output)) is not None:
        setattr(cache, _ATTRIBUTE, places)

    def rest(x: Any) -> Any:
        if not isinstance(x, Tensor) or x.dim() != 3:
            return x
        columns = torch.arange(x.shape[1] - places.extra, device=x.device)
        index = columns + places.extra * (columns >= places.last.to(x.device)[:, None])
        return x.gather(1, _like(index, x, 1))

    def all_of(part: Any) -> Any:
        return tuple(map(rest, part)) if isinstance(part, tuple) else part

    if isinstance(output, tuple):
        return (rest(output[0]), *map(all_of, output[1:]))
    for name, value in list(output.items()):
        if name == "last_hidden_state":
            output[name] = rest(value)
        elif name == "hidden_states":
            output[name] = all_of(value)
    return output
