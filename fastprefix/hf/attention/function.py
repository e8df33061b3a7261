"""The attention function that transformers calls in every layer of an attached model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fastprefix.errors import fail
from fastprefix.functional import prefix_attention
from fastprefix.hf.attention import masks
from fastprefix.hf.attention.recording import AttentionCall, record
from fastprefix.prefixes.prefix import LayerKV, LayerSlot

NAME = "fastprefix"
SLOT = "fastprefix"  # the child of an attention module that holds its prefixes


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
    """Attention of one layer over its prefix, if it has one, and its content.

    Args:
        module: the attention module; its child ``fastprefix`` holds the prefixes.
        query: ``[B, H, S, D]``; key, value: ``[B, H_kv, T, D]``, ``[B, H_kv, T, D_v]``.
        attention_mask: the result of ``masks.mask_function``, or a 4-D mask of the user's own.

    Returns:
        ``([B, S, H, D_v], None)``: attention weights are never materialised.
    """
    if kwargs.get("cache") is not None:
        raise ValueError(
            "cache: got a paged cache, expected none: continuous batching cannot run with a prefix attached"
        )
    slot = module._modules.get(SLOT)
    if isinstance(slot, LayerSlot) and slot.query_factor is not None:
        query = query * slot.query_factor.to(query.dtype)
    gated = masks.requested.implementation is not None
    if gated and isinstance(slot, LayerSlot) and slot.fallback_attention is not None:
        return _gated(slot, module, query, key, value, attention_mask, scaling, dropout, is_causal, kwargs)
    prefix_k, prefix_v, *choice = _prefix(module, query, key, value)
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    options: dict[str, Any] = {"scale": scaling, "dropout_p": dropout, "sinks": kwargs.get("s_aux")}
    if kwargs.get("softcap") is not None:
        options["softcap"] = float(kwargs["softcap"])
    options.update(_mask_options(attention_mask, causal, query.shape[2], key.shape[2]))
    _add_position_bias(options, kwargs.get("position_bias"))
    options.update((n, x) for n, x in zip(("prefix_ids", "prefix_lens", "gate"), choice, strict=True) if x is not None)
    tensors = {"q": query, "k": key, "v": value, "prefix_k": prefix_k, "prefix_v": prefix_v}
    if not torch.compiler.is_compiling():
        record(AttentionCall(module, tensors, options))
    o = prefix_attention(query, key, value, prefix_k, prefix_v, **options)
    return o.transpose(1, 2), None


def _gated(
    slot: LayerSlot,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None,
    dropout: float,
    is_causal: bool | None,
    kwargs: dict[str, Any],
) -> tuple[Tensor, None]:
    """The model's own attention of one layer over its content, plus the gate times attention over a gated prompt."""
    slot.ran = True
    if slot.keeps_query:
        slot.query = query
    own = {**kwargs, "scaling": scaling, "dropout": dropout}
    if is_causal is not None:
        own["is_causal"] = is_causal
    output, _ = ALL_ATTENTION_FUNCTIONS[slot.fallback_attention](module, query, key, value, attention_mask, **own)
    kv = slot()
    if kv is None:
        return output, None
    assert kv.gate is not None
    nothing_k, nothing_v = key[:, :, :0], value[:, :, :0]
    o = prefix_attention(query, nothing_k, nothing_v, kv.k, kv.v, causal=False, scale=scaling)  # [B, H, S, D_v]
    return output + (kv.gate.to(o.dtype)[:, None, None] * o).transpose(1, 2), None


def _prefix(module: nn.Module, query: Tensor, key: Tensor, value: Tensor) -> LayerKV:
    slot = module._modules.get(SLOT)
    if isinstance(slot, LayerSlot):
        slot.ran = True
        if slot.capturing:
            slot.captured = key, value
        if slot.keeps_query:
            slot.query = query
        kv = slot()
        if kv is not None:
            device = query.device
            return LayerKV(
                kv.k.to(device),
                kv.v.to(device),
                *(x if x is None else x.to(device) for x in (kv.ids, kv.lens, kv.gate)),
            )
    heads = key.shape[1]
    return LayerKV(query.new_empty(heads, 0, query.shape[3]), query.new_empty(heads, 0, value.shape[3]))


def _mask_options(mask: Tensor | None, causal: bool, rows: int, keys: int) -> dict[str, Any]:
    """The operator's arguments for one of the mask's four forms (see ``masks.py``)."""
    if mask is None:
        return {"causal": causal}
    if mask.dim() == 4 and not causal and rows == mask.shape[-1] < keys:
        got = f"a cache of {keys - rows} tokens in a bidirectional model: they have not seen what follows them"
        raise fail("past_key_values", got, "use_cache=False, or a causal model (is_decoder=True in its configuration)")
    if mask.dim() != 4 or mask.shape[-1] < keys:
        raise ValueError(f"attention_mask: got shape {list(mask.shape)}, expected [B, 1 or H, S, T] with T >= {keys}")
    mask = mask[..., :keys]
    if mask.dtype == torch.bool and mask.shape[1] == 1:
        if mask.stride(3) == 0 and keys > 1:
            return {"causal": False}
        batch_mask = mask[:, 0, 0]  # [B, T]
        if mask.shape[2] == 1:
            # With one row the mask says everything. With several it is padding, and the layer's causality applies too.
            return {"causal": causal and bool(rows > 1), "key_padding_mask": batch_mask}
        if mask.stride(2) == 0:
            return {"causal": False, "key_padding_mask": batch_mask}
    return {"causal": False, "bias": mask}


def _add_position_bias(options: dict[str, Any], position_bias: Tensor | None) -> None:
    if position_bias is None:
        return
    mask = options.get("bias")
    if mask is None:
        options["bias"] = position_bias
    elif mask.dtype == torch.bool:
        options["bias"] = position_bias.masked_fill(~mask, float("-inf"))
    else:
        options["bias"] = position_bias + mask
