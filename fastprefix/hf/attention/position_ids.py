"""Position ids of the content after a prefix: equal in training and in generation, padded or not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastprefix.errors import fail


def learned_table(owner: nn.Module) -> nn.Embedding | None:
    """The model's embedding of learned absolute positions; None without one."""
    for name, module in owner.named_modules():
        if isinstance(module, nn.Embedding) and name.rsplit(".", 1)[-1] in (
            "position_embeddings",
            "wpe",
            "embed_positions",
        ):
            return module
    return None


def content_positions(
    kwargs: dict[str, Any], offset: int | Tensor, causal: bool, table: nn.Embedding | None, first: int = 0
) -> Tensor:
    """``[B or 1, S]`` position ids for a forward's keyword arguments, shifted by ``offset`` (an int or ``[B, 1]``).

    Position ids among the arguments are shifted. Without them causal models count the tokens that are not padding, as
    ``generate`` does, so that a left-padded row gives the same in training; encoders count as the model does.
    ``first`` is the position of a row's first token in this model, ``table`` its learned positions.
    """
    position_ids = kwargs.get("position_ids")
    if position_ids is None:
        position_ids = first + _default_positions(kwargs, causal, None if table is None else table.padding_idx)
    position_ids = position_ids + (offset.to(position_ids.device) if isinstance(offset, Tensor) else offset)
    frees = "the prefix's" if isinstance(offset, Tensor) else offset
    check_table(position_ids, table, f" (position_offset='none' frees {frees})")
    return position_ids


def check_table(position_ids: Tensor, table: nn.Embedding | None, advice: str = "") -> None:
    """Raise ValueError for positions beyond a table of learned ones; on other devices the lookup itself fails."""
    if table is None or torch.compiler.is_compiling() or position_ids.device.type != "cpu" or not position_ids.numel():
        return
    last, given = table.num_embeddings - 1 - getattr(table, "offset", 0), int(position_ids.max())
    if given > last:
        raise fail("position_ids", given, f"at most {last}, the model's last learned position{advice}")


def _default_positions(kwargs: dict[str, Any], causal: bool, padding_idx: int | None) -> Tensor:
    input_ids, embeds = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
    source = input_ids if input_ids is not None else embeds
    if source is None:
        raise fail("input_ids", "neither input_ids nor inputs_embeds", "one of them")
    seq = source.shape[1] if input_ids is None else source.shape[-1]
    past = kwargs.get("past_key_values")
    start = 0 if past is None else past.get_seq_length()
    columns = torch.arange(seq, device=source.device) + start
    if padding_idx is not None:
        # RoBERTa's convention: real tokens count from padding_idx + 1, padding stays at padding_idx.
        if input_ids is None:
            return columns.unsqueeze(0) + padding_idx + 1
        real = input_ids.ne(padding_idx).long()
        return (real.cumsum(1) + start) * real + padding_idx
    mask = kwargs.get("attention_mask")
    if causal and isinstance(mask, dict):
        raise fail("position_ids", "None beside masks made in advance", "the position ids that belong to them")
    if causal and isinstance(mask, Tensor) and mask.dim() in (2, 3):
        mask = mask.reshape(-1, mask.shape[-1]).to(source.device)
        counted = (mask.long().cumsum(-1) - 1).clamp(min=0)
        # A mask may be longer than this forward: in a chunked prefill, or as long as a static cache's capacity.
        return counted[:, -seq:] if mask.shape[1] <= seq else counted.index_select(1, columns)
    return columns.unsqueeze(0)
