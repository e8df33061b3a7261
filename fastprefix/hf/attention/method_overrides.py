"""Models that compute attention themselves: one overridden method of a layer calls the attention function instead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastprefix.hf.attention import masks
from fastprefix.hf.attention.function import NAME, attention_forward


class MethodOverride:
    """Replaces a method of one attention module while the model's attention implementation is fastprefix's.

    With any other implementation the override calls the method that it replaces. It is an attribute of the instance,
    so that a copy or pickle of the model has an override that points at the copied layer.
    """

    def __init__(self, model: Any, module: nn.Module, method: str) -> None:
        self.model, self.module, self.method = model, module, method
        self.own = module.__dict__.get(method)  # an instance attribute of that name, if there was one

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module: Any = self.module
        if self.model.config._attn_implementation == NAME:
            return _OVERRIDES[type(module).__name__][1](module, *args, **kwargs)
        if self.own is not None:
            return self.own(*args, **kwargs)
        return getattr(type(module), self.method)(module, *args, **kwargs)


def find_overrides(model: Any) -> list[MethodOverride]:
    """New overrides for a model's layers, not installed yet; empty where no layer's class has an override.

    Models with ALiBi get none: its bias depends on a key's position alone, so that a row's length would change the
    weight of the prefix.
    """
    if getattr(model.config, "alibi", False):
        return []
    known = [(module, _OVERRIDES.get(type(module).__name__)) for module in model.modules()]
    return [MethodOverride(model, module, entry[0]) for module, entry in known if entry is not None]


def install_overrides(model: Any) -> list[MethodOverride]:
    """Install the overrides of a model's layers and return them."""
    found = find_overrides(model)
    for override in found:
        override.module.__dict__[override.method] = override
    return found


def remove_overrides(found: list[MethodOverride]) -> None:
    """Restore the layers' own methods."""
    for override in found:
        del override.module.__dict__[override.method]
        if override.own is not None:
            override.module.__dict__[override.method] = override.own


def _attn(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None
) -> tuple[Tensor, None]:
    """Replaces ``_attn`` of GPT-J and CodeGen, ``[B, H, S, D]`` in and out; these models pass queries in fp32."""
    dropout = module.attn_dropout.p if module.training else 0.0
    scale = float(1.0 / module.scale_attn)
    query, key = query.to(value.dtype), key.to(value.dtype)
    output, _ = attention_forward(
        module, query, key, value, attention_mask, scaling=scale, dropout=dropout, is_causal=True
    )
    return output.transpose(1, 2), None


def _attn_local(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None
) -> tuple[Tensor, None]:
    """Replaces ``_attn`` of GPT-Neo: no scale, and local layers have their window in a buffer ``[1, 1, max, max]``."""
    rows, keys = query.shape[2], key.shape[2]
    if module.attention_type == "local":
        masks.note_window(module.config.window_size)
        local = module.bias[:, :, keys - rows : keys, :keys].expand(len(query), -1, -1, -1)
        if attention_mask is None:
            attention_mask = local
        elif attention_mask.dtype == torch.bool:
            attention_mask = local & attention_mask[..., :keys]
        else:  # a caller's own mask
            hidden = torch.finfo(attention_mask.dtype).min
            attention_mask = attention_mask[..., :keys].masked_fill(~local, hidden)
    dropout = module.attn_dropout.p if module.training else 0.0
    output, _ = attention_forward(
        module, query, key, value, attention_mask, scaling=1.0, dropout=dropout, is_causal=True
    )
    return output.transpose(1, 2), None


def _falcon(
    module: Any,
    hidden_states: Tensor,
    alibi: Tensor | None,
    attention_mask: Tensor | None,
    layer_past: Any = None,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Replaces ``forward`` of Falcon's attention with rotary positions."""
    from transformers.models.falcon.modeling_falcon import apply_rotary_pos_emb

    query, key, value = (x.transpose(1, 2) for x in module._split_heads(module.query_key_value(hidden_states)))
    query, key = apply_rotary_pos_emb(query, key, *(position_embeddings or ()))
    if layer_past is not None:
        key, value = layer_past.update(key, value, module.layer_idx)
    if module.new_decoder_architecture:  # the model has repeated each group's head before the cache
        each = module.num_heads // module.num_kv_heads
        key, value = key[:, ::each], value[:, ::each]
    output, _ = attention_forward(module, query, key, value, attention_mask, is_causal=True)
    return module.dense(output.flatten(2)), None


# For a class of attention module: the method to override, and the function that replaces it.
_OVERRIDES: dict[str, tuple[str, Callable[..., Any]]] = {
    "GPTJAttention": ("_attn", _attn),
    "CodeGenAttention": ("_attn", _attn),
    "GPTNeoSelfAttention": ("_attn", _attn_local),
    "FalconAttention": ("forward", _falcon),
}
