"""The oracle of whole models: the prefix concatenated in front of every sample's keys and values, one softmax.

It uses none of fastprefix's code; the masks are those of transformers' eager attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

NAME = "explicit_concatenation"


class ConcatenatingModel:
    """A model whose named attention modules each get a prefix with every call.

    Args:
        model: changed in place: its attention implementation is replaced.
        names: names of the attention modules, in order.
    """

    def __init__(self, model: Any, names: Sequence[str]) -> None:
        self.model = model
        self._modules = [model.get_submodule(name) for name in names]
        model.set_attn_implementation(NAME)

    def __call__(self, prefixes: Sequence[tuple[Tensor, Tensor]], **inputs: Tensor) -> Any:
        """The model's output; ``prefixes`` are the keys and values ``[H_kv, P, D]`` of each module."""
        for module, pair in zip(self._modules, prefixes, strict=True):
            module.concatenated = pair
        return self.model(**inputs)


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float, **kwargs: Any
) -> tuple[Tensor, None]:
    groups = query.shape[1] // key.shape[1]
    prefix_k, prefix_v = (x.to(query.dtype).expand(query.shape[0], -1, -1, -1) for x in module.concatenated)
    keys = torch.cat([prefix_k, key], 2).repeat_interleave(groups, 1)
    values = torch.cat([prefix_v, value], 2).repeat_interleave(groups, 1)
    scores = query @ keys.transpose(-1, -2) * scaling
    if attention_mask is not None:
        scores = scores + torch.nn.functional.pad(attention_mask.to(scores.dtype), (prefix_k.shape[2], 0))
    return (torch.softmax(scores, -1) @ values).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, eager_mask)
