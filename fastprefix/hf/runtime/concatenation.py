"""Concatenates a prompt's embeddings to every row, where sharing the prompt would not be exact.

The prompt is in front of the row's padding where the model takes position ids, which put its tokens next to the row's.
Encoders of encoder-decoders, and others that count the places of a text themselves, get the prompt behind the padding:
in T5 the distance from the prompt to a token is then the same in padded rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastprefix.errors import fail
from fastprefix.hf.attention import masks
from fastprefix.hf.model.facts import ModelFacts
from fastprefix.hf.runtime.forward_context import ForwardContext


def prepend(
    facts: ModelFacts,
    context: ForwardContext,
    kwargs: dict[str, Any],
    first: int,
    outer_made_masks: bool,
    pooled: bool = False,
) -> None:
    """Put a context's embeddings in front of the rows of a forward whose position ids are set already.

    Args:
        facts: about the model. In an encoder-decoder the forward is the encoder's.
        context: holds the embeddings in ``concatenated``.
        kwargs: the forward's keyword arguments, changed in place.
        first: position of a text's first token in this model.
        outer_made_masks: whether an outer module has already made the masks in ``kwargs`` with our mask function.
        pooled: whether a head pools one place of the output, the first: there the prompt is in front of the padding.
    """
    assert context.concatenated is not None
    stack = facts.layers.prompted
    batch = facts.layers.batch_size(kwargs)
    ids, embeds = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
    if embeds is None:
        embeds = stack.word_embeddings(ids)
    prompt = context.concatenated.to(embeds.dtype).expand(batch, -1, -1)
    tokens = prompt.shape[1]
    prompt_mask = context.concatenated_mask
    prompt_mask = None if prompt_mask is None else prompt_mask.expand(batch, -1)
    mask = kwargs.get("attention_mask")
    if masks.requested.boundary is not None:
        raise fail(
            "position_ids", "packed documents (they jump)", "one document a row: the prompt is concatenated here"
        )
    if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
        # Masks made by our mask function have a known form; a caller's own masks may be anything.
        if prompt_mask is not None or stack.causal or not outer_made_masks or not _is_bool(mask):
            raise fail("attention_mask", "a mask made in advance", "[B, S] padding: the prompt is concatenated here")
        kwargs["attention_mask"] = _in_front(mask, tokens)
    elif mask is not None or prompt_mask is not None:
        mask = embeds.new_ones(batch, embeds.shape[1], dtype=torch.long) if mask is None else mask
        prompt_mask = mask.new_ones(batch, tokens) if prompt_mask is None else prompt_mask.to(mask.dtype)
        kwargs["attention_mask"] = torch.cat([prompt_mask, mask], 1)
    if ids is not None and context.concatenated_ids is not None:  # some layers read token ids in addition to embeddings
        kwargs["input_ids"] = torch.cat([context.concatenated_ids.to(ids.device).expand(batch, -1), ids], 1)
    else:
        kwargs["input_ids"], kwargs["inputs_embeds"] = None, torch.cat([prompt, embeds], 1)
    positions = kwargs.get("position_ids")  # [B or 1, S], or [axes, B or 1, S]
    counted = (positions is None and not pooled) or stack is not facts.layers.main
    if positions is not None:
        positions = positions.expand(*positions.shape[:-2], batch, -1)
        if stack is not facts.layers.main:
            positions = positions + tokens
        if prompt_mask is None:
            own = torch.arange(tokens, device=positions.device).expand(batch, -1)
        else:
            own = (prompt_mask.long().cumsum(1) - 1).clamp(min=0)
        own = (own + first + context.concatenated_from).expand(*positions.shape[:-1], -1)
        kwargs["position_ids"] = torch.cat([own, positions], -1)
    if kwargs.get("token_type_ids") is not None:
        types = kwargs["token_type_ids"]
        kwargs["token_type_ids"] = torch.cat([types.new_zeros(batch, tokens), types], 1)
    if "use_cache" in stack.owner_arguments:
        kwargs["use_cache"] = False  # the prompt would stay in the cache as content
    if counted and isinstance(mask, Tensor):
        context.places = _behind_padding(mask, tokens)
        for name in ("attention_mask", "inputs_embeds", "position_ids", "token_type_ids"):
            if isinstance(x := kwargs.get(name), Tensor):
                kwargs[name] = _taken(x, context.places)


def _behind_padding(mask: Tensor, tokens: int) -> Tensor:
    """``[B, P + S]`` places from which the tokens of prompt and row are taken to move the prompt behind the padding.

    ``mask [B, S]`` is the row's own.
    """
    padding = (mask.cumsum(1) == 0).sum(1, keepdim=True)  # [B, 1], before a row's first token
    places = torch.arange(tokens + mask.shape[1], device=mask.device).expand(len(mask), -1)
    behind = torch.where(places < padding + tokens, places - padding, places)
    return torch.where(places < padding, places + tokens, behind)


def _taken(x: Tensor, places: Tensor) -> Tensor:
    """The values ``[B, P + S]`` or ``[B, P + S, d]`` at these places of each row."""
    places = places.to(x.device)
    return x.gather(1, places if x.dim() == 2 else places[..., None].expand(-1, -1, x.shape[2]))


def extend_mask(kwargs: dict[str, Any], states: Tensor, tokens: int, known: bool) -> None:
    """Make a decoder's mask over its encoder's states longer by a soft prompt's ``tokens``, in place.

    Args:
        kwargs: the decoder's keyword arguments.
        states: the encoder's, ``[B, P + T, d]``.
        tokens: how many of the states are the prompt's.
        known: whether they were made with the prompt, where no mask tells.

    Raises:
        ValueError: the states were computed without the prompt, or nothing tells that they were not.
    """
    mask = kwargs.get("encoder_attention_mask")
    expected = f"those of the model's own encoder with the prompt of {tokens} tokens that is active now"
    if isinstance(mask, Tensor) and mask.dim() == 2:
        if mask.shape[1] + tokens != states.shape[1]:
            got = f"{states.shape[1]} states for an attention_mask of {mask.shape[1]} tokens"
            raise fail("encoder_outputs", got, f"{mask.shape[1] + tokens}: {expected}")
        whole = torch.cat([mask.new_ones(len(mask), tokens), mask], 1)
        kwargs["encoder_attention_mask"] = _taken(whole, _behind_padding(mask, tokens))
    elif mask is not None:
        raise fail("attention_mask", "a mask made in advance", "[B, T] padding of the source: a prompt lengthens it")
    elif not known:
        raise fail("encoder_outputs", "states without an attention_mask", f"a mask of the source, and {expected}")


def _is_bool(mask: Any) -> bool:
    masks = mask.values() if isinstance(mask, dict) else [mask]
    return all(x is None or x.dtype == torch.bool for x in masks)


def _in_front(mask: Any, tokens: int) -> Any:
    """Extend masks that an outer module made by ``tokens`` prompt tokens in front, which every row sees.

    If a row's first real token sees the tokens after it, the row is bidirectional and so are its prompt tokens.
    Otherwise the row is causal, and so are they. The masks' forms are those of ``attention/masks.py``: a mask with
    stride 0 over the rows must keep it.
    """
    if isinstance(mask, dict):
        return {name: _in_front(x, tokens) for name, x in mask.items()}
    if mask is None:
        return None
    rows = mask.shape[2]
    if mask.stride(2) == 0:  # only padding is hidden
        wider = torch.nn.functional.pad(mask[:, :, :1], (tokens, 0), value=True)
        return wider.expand(-1, -1, tokens + rows, -1)
    first = mask.diagonal(dim1=2, dim2=3).to(torch.uint8).argmax(-1)  # [B, 1], the first token that sees itself
    seen = mask.gather(2, first[..., None, None].expand(-1, -1, 1, mask.shape[3]))  # [B, 1, 1, T]
    ahead = seen.sum(-1, keepdim=True) > 1
    own = torch.ones(tokens, tokens, dtype=torch.bool, device=mask.device)
    block = torch.where(ahead, own, own.tril())  # [B, 1, P, P]
    top = torch.cat([block, (seen & ahead).expand(-1, -1, tokens, -1)], 3)
    return torch.cat([top, torch.nn.functional.pad(mask, (tokens, 0), value=True)], 2)


def cut(output: Any, tokens: int, keep: int, places: Tensor | None = None) -> Any:
    """Drop the prompt's ``tokens`` positions of a forward's output, except the last ``keep`` of them.

    ``places`` are the context's, where the prompt's positions are not the first ones.
    """
    back = None if places is None else places.argsort(1)

    def rest(x: Any, kept: int) -> Any:
        if not isinstance(x, Tensor) or x.dim() != 3:
            return x
        return (x if back is None else _taken(x, back))[:, tokens - kept :]

    if isinstance(output, tuple):
        others = (tuple(rest(x, 0) for x in part) if isinstance(part, tuple) else part for part in output[1:])
        return (rest(output[0], keep), *others)
    for name, value in list(output.items()):
        if name == "last_hidden_state":
            output[name] = rest(value, keep)
        elif name == "hidden_states":
            output[name] = tuple(rest(x, 0) for x in value)
    return output
