"""Checks how a model's layers see a text: whether tokens depend on later ones, and whether each token has one key."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastprefix.errors import fail
from fastprefix.hf.attention.recording import AttentionCall
from fastprefix.hf.model.dummy_inputs import dummy_inputs
from fastprefix.hf.model.layers import AttentionStack
from fastprefix.hf.model.probing import does_not_dispatch, evaluating, run

_TOKENS = 8  # length of the text that is run


def runs(model: Any) -> bool:
    """Whether a bare model runs on its dummy inputs."""
    try:
        run(model, dummy_inputs(model, tokens=_TOKENS))
    except Exception:  # any error here is the model's own
        return False
    return True


def check_keys(model: nn.Module, stack: AttentionStack, calls: Sequence[AttentionCall]) -> None:
    """Raise ValueError where a layer has not one key for each query of a text (DeepSeek V4 compresses keys)."""
    counts = {(call.tensors["q"].shape[2], call.tensors["k"].shape[2]) for call in calls}
    if stack.main_input == "input_ids" and not stack.extra_inputs and any(rows != keys for rows, keys in counts):
        got = f", with one key for each token: {_TOKENS} tokens have {sorted({keys for _, keys in counts})} keys"
        raise does_not_dispatch(model, got)


def sees_the_future(stack: AttentionStack) -> bool:
    """Whether the outputs of a stack's first tokens, patches or frames depend on the last value of its input."""
    # Not token 0, which is often padding and embedded as nothing.
    inputs, hidden = stack.dummy_inputs(tokens=_TOKENS), []
    content = inputs[stack.main_input]
    with evaluating(stack.owner):
        for last in (1, 2):
            content.view(-1)[-1] = last
            output = stack.owner(**inputs)[0]
            if not isinstance(output, Tensor):
                got = f"{type(stack.owner).__name__}, whose forward returns no hidden states first"
                raise fail("model", got, "the model inside it, which does")
            hidden.append(output[:, :-1])
    before, after = hidden
    # Rows of a matrix product may round differently; a mask that shows later tokens changes more than that.
    tiny = 64 * torch.finfo(before.dtype).eps
    return not torch.allclose(before, after, rtol=tiny, atol=tiny * before.abs().max().item())
