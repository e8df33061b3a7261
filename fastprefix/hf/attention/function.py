"""The attention function that transformers calls in every layer of an attached model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fastprefix.errors import fail
from fastprefix.functional import add_gated, prefix_attention
from fastprefix.hf.attention import masks, packed_prompts
from fastprefix.hf.attention.recording import AttentionCall, is_recording, record
from fastprefix.prefixes.memory import add_memory
from fastprefix.prefixes.prefix import LayerKV, LayerSlot, is_hooked

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
    kv = None
    if isinstance(slot, LayerSlot):
        if slot.projecting:
            slot.captured = key, value
            return value.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[3]), None
        if slot.query_factor is not None:
            query = query * slot.query_factor.to(query.dtype)
        if slot.packed is not None:
            plain = attention_mask is None and not dropout and is_causal is not False
            return _packed(slot, query, key, value, plain, scaling, kwargs), None
        if slot.fallback_attention is not None and masks.requested.implementation is not None:
            return _gated(slot, module, query, key, value, attention_mask, scaling, dropout, is_causal, kwargs)
        if not slot.ran or slot.capturing or slot.keeps_query:
            _note(slot, query, key, value)
        kv = slot() if is_hooked(slot) else slot.forward()
    if kv is None:
        kv = _no_prefix(query, key, value)
    prefix_k, prefix_v, ids, lens, gate, memory, prefix_bias = kv
    if prefix_k.device != query.device:
        device = query.device
        prefix_k, prefix_v = prefix_k.to(device), prefix_v.to(device)
        beside = (ids, lens, gate, memory, prefix_bias)
        ids, lens, gate, memory, prefix_bias = (x if x is None else x.to(device) for x in beside)
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    options: dict[str, Any] = {"causal": causal, "scale": scaling, "dropout_p": dropout}
    if attention_mask is not None:
        options.update(_mask_options(attention_mask, causal, query.shape[2], key.shape[2]))
    _add_score_options(options, kwargs)
    if kwargs.get("position_bias") is not None:
        options["bias"] = _add_mask(kwargs["position_bias"], options.get("bias"))
    if ids is not None:
        options["prefix_ids"] = ids
    if lens is not None:
        options["prefix_lens"] = lens
    if gate is not None:
        options["gate"] = gate
    if prefix_bias is not None:
        options["prefix_bias"] = prefix_bias
    if is_recording():
        tensors = {"q": query, "k": key, "v": value, "prefix_k": prefix_k, "prefix_v": prefix_v}
        record(AttentionCall(module, tensors, options))
    o = prefix_attention(query, key, value, prefix_k, prefix_v, **options)
    if memory is not None:
        o = add_memory(o, query, memory)
    return o.transpose(1, 2), None


def _note(slot: LayerSlot, query: Tensor, key: Tensor, value: Tensor) -> None:
    """Keep in a layer's slot that the layer ran, and its query, keys and values where they are asked for."""
    slot.ran = True
    if slot.capturing:
        slot.captured = key, value
    if slot.keeps_query:
        slot.query = query


def _add_score_options(options: dict[str, Any], kwargs: dict[str, Any]) -> None:
    """Add what a layer asks for beside its mask: a soft cap of scores, and sinks."""
    if kwargs.get("softcap") is not None:
        options["softcap"] = float(kwargs["softcap"])
    if kwargs.get("s_aux") is not None:
        options["sinks"] = kwargs["s_aux"]


def _packed(
    slot: LayerSlot,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plain: bool,
    scaling: float | None,
    kwargs: dict[str, Any],
) -> Tensor:
    """``[1, T, H, D_v]``: attention over prompts and rows that run as one text: plain, causal and without a mask."""
    assert slot.packed is not None
    if not plain or kwargs.get("position_bias") is not None:
        expected = "causal attention without dropout, and no masks of a model's own"
        raise RuntimeError(f"fastprefix: prompts and rows cannot run as one text here, which needs {expected}")
    slot.ran = True
    options: dict[str, Any] = {"scale": scaling}
    _add_score_options(options, kwargs)
    return packed_prompts.attend(slot.packed, query, key, value, options)


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
    _note(slot, query, key, value)
    own = {**kwargs, "scaling": scaling, "dropout": dropout}
    if is_causal is not None:
        own["is_causal"] = is_causal
    output, _ = ALL_ATTENTION_FUNCTIONS[slot.fallback_attention](module, query, key, value, attention_mask, **own)
    kv = slot()
    if kv is None:
        return output, None
    assert kv.gate is not None
    o = add_gated(output.transpose(1, 2), query, kv.k, kv.v, kv.gate, scale=scaling)  # [B, H, S, D_v]
    return o.transpose(1, 2), None


def _no_prefix(query: Tensor, key: Tensor, value: Tensor) -> LayerKV:
    heads = key.shape[1]
    return LayerKV(query.new_empty(heads, 0, query.shape[3]), query.new_empty(heads, 0, value.shape[3]))


def _mask_options(mask: Tensor, causal: bool, rows: int, keys: int) -> dict[str, Any]:
    """The operator's arguments for a mask in one of its forms (see ``masks.py``)."""
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


def _add_mask(position_bias: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return position_bias
    if mask.dtype == torch.bool:
        return position_bias.masked_fill(~mask, float("-inf"))
    return position_bias + mask
