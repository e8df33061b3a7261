"""Concatenates a prompt's embeddings to every row, where sharing the prompt would not be exact."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastprefix.errors import fail
from fastprefix.hf.attention import masks
from fastprefix.hf.model.facts import ModelFacts
from fastprefix.hf.runtime.forward_context import ForwardContext


def prepend(
    facts: ModelFacts, context: ForwardContext, kwargs: dict[str, Any], first: int, outer_made_masks: bool
) -> None:
    """Put a context's embeddings in front of the rows of a forward whose position ids are set already.

    Args:
        facts: about the model.
        context: holds the embeddings in ``concatenated``.
        kwargs: the forward's keyword arguments, changed in place.
        first: position of a text's first token in this model.
        outer_made_masks: whether an outer module has already made the masks in ``kwargs`` with our mask function.
    """
    assert context.concatenated is not None
    batch = facts.layers.batch_size(kwargs)
    ids, embeds = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
    if embeds is None:
        embeds = facts.model.get_input_embeddings()(ids)
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
        if prompt_mask is not None or facts.layers.main.causal or not outer_made_masks or not _is_bool(mask):
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
    positions = kwargs["position_ids"]  # [B or 1, S], or [axes, B or 1, S]
    positions = positions.expand(*positions.shape[:-2], batch, -1)
    if prompt_mask is None:
        own = torch.arange(tokens, device=positions.device).expand(batch, -1)
    else:
        own = (prompt_mask.long().cumsum(1) - 1).clamp(min=0)
    own = (own + first + context.concatenated_from).expand(*positions.shape[:-1], -1)
    kwargs["position_ids"] = torch.cat([own, positions], -1)
    if kwargs.get("token_type_ids") is not None:
        types = kwargs["token_type_ids"]
        kwargs["token_type_ids"] = torch.cat([types.new_zeros(batch, tokens), types], 1)
    if "use_cache" in facts.layers.main.owner_arguments:
        kwargs["use_cache"] = False  # the prompt would stay in the cache as content


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


def cut(output: Any, tokens: int, keep: int) -> Any:
    """Drop the first ``tokens`` positions of a forward's output, except the last ``keep`` of them."""

    def rest(x: Any, kept: int) -> Any:
        return x[:, tokens - kept :] if isinstance(x, Tensor) and x.dim() == 3 else x

    if isinstance(output, tuple):
        others = (tuple(rest(x, 0) for x in part) if isinstance(part, tuple) else part for part in output[1:])
        return (rest(output[0], keep), *others)
    for name, value in list(output.items()):
        if name == "last_hidden_state":
            output[name] = rest(value, keep)
        elif name == "hidden_states":
            output[name] = tuple(rest(x, 0) for x in value)
    return output
