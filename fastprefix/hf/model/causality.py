"""What a model's layers see of a text: whether its first tokens depend on those behind them, and one key for each."""

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

_TOKENS = 8  # of a text that is run for it


def runs(model: Any) -> bool:
    """Whether a bare model runs on the example of its kind."""
    try:
        run(model, dummy_inputs(model, tokens=_TOKENS))
    except Exception:  # whatever it is, it is the model's own
        return False
    return True


def check_keys(model: nn.Module, stack: AttentionStack, calls: Sequence[AttentionCall]) -> None:
    """Raise ValueError where a layer of a text's had not one key for each query (DeepSeek V4 compresses them)."""
    counts = {(call.tensors["q"].shape[2], call.tensors["k"].shape[2]) for call in calls}
    if stack.main_input == "input_ids" and not stack.extra_inputs and any(rows != keys for rows, keys in counts):
        got = f", with one key for each token: {_TOKENS} tokens have {sorted({keys for _, keys in counts})} keys"
        raise does_not_dispatch(model, got)


def sees_the_future(stack: AttentionStack) -> bool:
    """Whether a stack's first tokens, patches or frames depend on the last number of its input."""
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
    # Other rows of a product may round differently; a mask that lets the future in changes more than that.
    tiny = 64 * torch.finfo(before.dtype).eps
    return not torch.allclose(before, after, rtol=tiny, atol=tiny * before.abs().max().item())
