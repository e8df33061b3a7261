"""Models with a soft prompt, and the same with its embeddings concatenated by hand."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

import fastprefix
from fastprefix import PromptConfig, init
from tests.model_zoo.architectures import ROWS, VOCAB

P, B, S = 5, 3, 7


def tokens(batch: int = B, length: int = S) -> Tensor:
    torch.manual_seed(1)
    return torch.randint(3, VOCAB, (batch, length))


def prompted(name: str, dtype: torch.dtype = torch.float64, tokens: int = P) -> tuple[Any, Any, Any]:
    """A bare model, a copy with a soft prompt, and the prompt."""
    bare = ROWS[name].build(dtype)
    model = copy.deepcopy(bare)
    bare.set_attn_implementation("eager")  # transformers' sdpa may leave a softcap out
    prompt = fastprefix.attach(model, PromptConfig(tokens, init=init.normal(1.0)))
    prompt.to(dtype)
    return bare, model, prompt


def concatenated(bare: Any, embedding: Tensor, ids: Tensor, mask: Tensor | None = None, **kwargs: Any) -> Any:
    """The oracle: transformers alone, the embeddings in front of every row, positions that count real tokens."""
    own = bare.get_input_embeddings()(ids)
    row = embedding.to(own.dtype).expand(len(ids), -1, -1)
    mask = torch.ones_like(ids) if mask is None else mask
    whole = torch.cat([mask.new_ones(len(ids), row.shape[1]), mask], 1)
    if "labels" in kwargs:
        kwargs["labels"] = torch.cat([kwargs["labels"].new_full((len(ids), row.shape[1]), -100), kwargs["labels"]], 1)
    if whole.all():
        return bare(inputs_embeds=torch.cat([row, own], 1), **kwargs)
    positions = (whole.cumsum(1) - 1).clamp(min=0)
    return bare(inputs_embeds=torch.cat([row, own], 1), attention_mask=whole, position_ids=positions, **kwargs)


def padded(side: str) -> Tensor:
    mask = torch.ones(B, S, dtype=torch.long)
    for row in range(B):
        mask[row, slice(0, row) if side == "left" else slice(S - row, S)] = 0
    return mask
