"""What the table's models are run on, where their content stands, and what of their output counts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.model_zoo.architectures import ROWS, VOCAB

P, S = 5, 9
SAMPLES = 20  # of a sound, 3 to a frame


def inputs(name: str, padding: str = "none", dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Three rows ``[3, S]`` of ids, images or sounds, and a mask; row 2 is never padded."""
    torch.manual_seed(1)
    row = ROWS[name]
    if row.content == "image":
        return {"pixel_values": torch.randn(3, 3, 32, 32, dtype=dtype)}
    if row.content == "spectrogram":
        return {"input_values": torch.randn(3, row.options["max_length"], row.options["num_mel_bins"], dtype=dtype)}
    length = SAMPLES if row.content == "sound" else S
    mask = torch.ones(3, length, dtype=torch.long)
    for i, n in enumerate((4, 1)):
        n *= length // S
        if padding == "left":
            mask[i, :n] = 0
        elif padding == "right":
            mask[i, length - n :] = 0
    if row.content == "sound":
        content = {"input_values": torch.randn(3, length, dtype=dtype) * mask}
    else:
        ids = torch.randint(3, VOCAB, (3, S))
        content = {"input_ids": ids.masked_fill(mask == 0, row.options.get("pad_token_id") or 0)}
    return content if padding == "none" else {**content, "attention_mask": mask}


def positions(name: str, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The ids of content, said from scratch: P + (index among the real tokens), encoders by column; or none at all."""
    row = ROWS[name]
    if row.content != "text":
        return {}
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    if row.positions_behind is not None:
        real = ids != row.positions_behind
        found = torch.where(real, real.cumsum(1) + row.positions_behind, row.positions_behind) + P
    elif mask is None or not row.causal:
        found = (torch.arange(S) + P).expand(ids.shape)
    else:
        found = (mask.cumsum(1) - 1).clamp(min=0) + P
    return {"position_ids": found}


def output(model: Any, result: Any, batch: dict[str, Tensor]) -> Tensor:
    """Logits or hidden states of what is not padding."""
    x = result.logits if hasattr(result, "logits") else result.last_hidden_state
    mask = batch.get("attention_mask")
    if mask is not None and "input_values" in batch:
        mask = model._get_feature_vector_attention_mask(x.shape[1], mask)
    return x if mask is None else x[mask.bool()]


def without_dropout(model: Any) -> Any:
    """The model, its every probability of dropping something 0."""
    for module in model.modules():
        for attribute, value in vars(module).items():
            if isinstance(value, float) and (attribute == "p" or "drop" in attribute):
                setattr(module, attribute, 0.0)
    return model


def gradients(x: Tensor, leaves: list[Tensor]) -> tuple[Tensor, ...]:
    """Of a sum in which every number has a weight of its own."""
    weight = torch.sin(torch.arange(x.numel(), dtype=x.dtype)).view(x.shape)
    return torch.autograd.grad((x * weight).sum(), leaves)
