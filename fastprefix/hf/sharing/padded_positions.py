"""Finds out whether a text means something else where padding stands in front of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastprefix.hf.attention.position_ids import learned_table
from fastprefix.hf.model import probing
from fastprefix.hf.model.facts import ModelFacts

_PADDING = 2


def counts_padding(facts: ModelFacts) -> bool:
    """Whether a text padded on the left has to begin at the position of its column to give what the model gives.

    That is so where the model counts columns when no position ids are passed, and positions are not relative: learned
    ones, rotary ones behind which queries and keys are normalised (HunYuan), queries scaled by their position.
    """
    stack = facts.layers.main
    ids = stack.dummy_inputs(tokens=5)["input_ids"]
    inputs = {"input_ids": torch.arange(1, 6, device=ids.device)[None], "attention_mask": torch.ones_like(ids)}
    inputs["attention_mask"][:, :_PADDING] = 0
    columns = torch.arange(5, device=ids.device)[None]

    def hidden(**positions: Tensor) -> Tensor:
        with probing.evaluating(stack.owner), torch.autocast(ids.device.type, enabled=False):
            output: Any = stack.owner(**inputs, **positions)
        found: Tensor = output[0][:, _PADDING:]
        return found

    counted = (columns - _PADDING).clamp(min=0)
    with _uneven_norms(stack.owner):
        own = hidden()
        if not torch.equal(own, hidden(position_ids=columns)):
            return False
        by_text = hidden(position_ids=counted)
    if learned_table(stack.owner) is not None:
        return not torch.equal(own, by_text)
    rope = getattr(facts.model.config.get_text_config(), "rope_parameters", None) or {}
    far = (own.double() - by_text.double()).abs().max() > 64 * torch.finfo(own.dtype).eps * own.double().abs().max()
    return bool(far) or "llama_4_scaling_beta" in rope


@contextmanager
def _uneven_norms(owner: nn.Module) -> Iterator[None]:
    """Give vectors of parameters other numbers inside the block: norms of ones would hide what they do to positions."""
    vectors = [p for p in owner.parameters() if p.dim() == 1 and p.is_floating_point() and not p.is_inference()]
    before = [p.detach().clone() for p in vectors]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in vectors:
            p.mul_((1 + torch.rand(p.shape, generator=generator)).to(p))
    try:
        yield
    finally:
        with torch.no_grad():
            for p, x in zip(vectors, before, strict=True):
                p.copy_(x)
