"""The strongest baseline for whole models: a prefix concatenated in front of K and V of every sample.

It uses SDPA's fast kernels, without a dense mask and without repeated heads. It works in causal models without padding.
Needs transformers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

NAME = "fastprefix_concatenated"


def install(model: Any, num_virtual_tokens: int, std: float = 0.02) -> list[nn.Parameter]:
    """Give every attention layer a random prefix in fp32, and freeze the rest of the model.

    Returns:
        the keys and values ``[H_kv, P, D]`` of each layer in turn: k, v, k, v ...

    Raises:
        ValueError: no layer of the model has a ``k_proj`` and a ``head_dim``.
    """
    model.requires_grad_(False)
    trained: list[nn.Parameter] = []
    for module in model.modules():
        projection, dim = getattr(module, "k_proj", None), getattr(module, "head_dim", None)
        if isinstance(projection, nn.Linear) and isinstance(dim, int):
            shape = (projection.out_features // dim, num_virtual_tokens, dim)
            module.prefix_k, module.prefix_v = (
                nn.Parameter(torch.randn(shape, device=projection.weight.device) * std) for _ in range(2)
            )
            trained += [module.prefix_k, module.prefix_v]
    if not trained:
        raise ValueError(f"model: got {type(model).__name__}, expected attention with a k_proj and a head_dim")
    model.set_attn_implementation(NAME)
    return trained


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, scaling: float, **kwargs: Any
) -> tuple[Tensor, None]:
    from torch.nn.attention.bias import causal_lower_right  # imports dynamo: a second that only this needs

    def joined(prefix: Tensor, own: Tensor) -> Tensor:
        return torch.cat([prefix.to(own.dtype).expand(own.shape[0], -1, -1, -1), own], 2)

    keys, values = joined(module.prefix_k, key), joined(module.prefix_v, value)
    bias = causal_lower_right(query.shape[2], keys.shape[2])
    grouped = query.shape[1] != keys.shape[1]
    o = scaled_dot_product_attention(query, keys, values, attn_mask=bias, scale=scaling, enable_gqa=grouped)
    return o.transpose(1, 2).contiguous(), None


def _no_mask(**kwargs: Any) -> None:
    return None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _no_mask)
