"""The operator as transformers' attention interface calls it: content only, P = 0."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .functional import prefix_attention


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer, for ``attn_implementation="org/fastprefix:attention_forward"``.

    Args:
        module: the attention module; its ``is_causal`` counts where the argument is None.
        query: ``[B, H, S, D]``; key, value: ``[B, H_kv, T, D]``, ``[B, H_kv, T, D_v]``.
        attention_mask: None; ``[B, T]``, True or 1 = attend, shorter than T where a static cache is not full; or a mask
            ``[B, 1 or H, S, T]``, bool or added to the scores, which then is the whole truth.
        scaling: multiplies ``q k^T``.
        dropout: probability of dropping an attention weight.
        is_causal: whether a query sees no later key.
        kwargs: of these ``softcap``, ``sliding_window``, ``s_aux`` (sinks ``[H]``) and ``position_ids`` (``[1, S]``,
            which start over at each packed document) are read.

    Returns:
        ``([B, S, H, D_v], None)``: attention weights are never materialised.

    Raises:
        ValueError: as ``prefix_attention``; a paged cache; or a static cache that is not full, without a mask.
    """
    if kwargs.get("cache") is not None:
        raise ValueError("cache: got a paged cache, expected none: continuous batching is not supported")
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    options: dict[str, Any] = {"causal": causal, "window": kwargs.get("sliding_window")}
    if attention_mask is not None and attention_mask.dim() == 4:
        options = {"causal": False, "bias": attention_mask[..., : key.shape[2]]}
    elif attention_mask is not None:
        seen = attention_mask.shape[1]
        key, value = key[:, :, :seen], value[:, :, :seen]
        options["key_padding_mask"] = attention_mask.to(torch.bool)
    else:
        position_ids = kwargs.get("position_ids")
        options["segment_ids"] = _packed_documents(position_ids, key)
        if causal:
            _refuse_a_cache_that_is_not_full(position_ids, query.shape[2], key)
    softcap = kwargs.get("softcap")
    heads, dim, width = key.shape[1], query.shape[3], value.shape[3]
    o = prefix_attention(
        query,
        key,
        value,
        query.new_empty(heads, 0, dim),
        query.new_empty(heads, 0, width),
        scale=scaling,
        dropout_p=dropout,
        sinks=kwargs.get("s_aux"),
        softcap=None if softcap is None else float(softcap),
        **options,
    )
    return o.transpose(1, 2), None


def _packed_documents(position_ids: Tensor | None, key: Tensor) -> Tensor | None:
    """The document ``[1, T]`` of each token where a batch of one row holds several, one after the other; else None."""
    if position_ids is None or position_ids.dim() != 2 or key.shape[0] != 1 or torch.compiler.is_compiling():
        return None
    if position_ids.shape != (1, key.shape[2]):  # some keys come from a cache
        return None
    starts = position_ids[:, 1:] != position_ids[:, :-1] + 1
    if not bool(starts.any()):
        return None
    return torch.nn.functional.pad(starts.cumsum(1), (1, 0))


def _refuse_a_cache_that_is_not_full(position_ids: Tensor | None, rows: int, key: Tensor) -> None:
    """A static cache has its whole capacity as keys, and no argument says which of them are there yet.

    The queries are taken for the last rows of the keys. Positions that end before the keys do contradict that. Some
    models give their attention no positions: there the last key tells, which is zero until it is written.
    """
    keys = key.shape[2]
    if rows == keys:
        return
    message = "a static cache that is not full needs an attention_mask with hidden keys; expected a dynamic cache"
    if position_ids is None or position_ids.dim() != 2:
        written = key[:, :, -1].ne(0).any()
        if torch.compiler.is_compiling():
            torch._assert_async(written, f"key: {message}")
        elif not bool(written):
            raise ValueError(f"key: got zeros as the last of {keys} keys: {message}")
        return
    last = position_ids[:, -1].max()
    if torch.compiler.is_compiling():
        torch._assert_async(last >= keys - 1, f"position_ids: {message}")
    elif int(last) < keys - 1:
        raise ValueError(f"position_ids: got {int(last)} as the last of {keys} keys: {message}")
