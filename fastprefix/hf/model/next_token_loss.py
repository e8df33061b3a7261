"""Whether a model's loss is that of predicting the next token: told by what it does, whatever its class is called."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from fastprefix.hf.model import layers as model_layers
from fastprefix.hf.model import probing

IGNORED = -100
_TOKENS = 3


def predicts_next_token(model: Any, stack: model_layers.AttentionStack) -> bool:
    """Whether position i's logits are held to label i + 1, so that a prompt in front predicts a row's first token.

    A label of the first token then counts for nothing, and one of the last token does. Where that cannot be tried (a
    forward without labels, or with labels of another shape) transformers' own word is taken: what generates predicts.
    """
    if stack.owner is model or stack.main_input != "input_ids":
        return False
    inputs = {**stack.dummy_inputs(_TOKENS)}
    if "labels" not in inspect.signature(model.forward).parameters:
        return bool(model.can_generate())
    try:
        first, last = (_loss(model, inputs, place, label=1) for place in (0, _TOKENS - 1))
        if first != first and last == last:  # the mean over no tokens is nan
            return True
        other_first, other_last = (_loss(model, inputs, place, label=2) for place in (0, _TOKENS - 1))
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
        return bool(model.can_generate())  # a classifier's labels are [B], say
    return first == other_first and last != other_last


def _loss(model: nn.Module, inputs: dict[str, Tensor], place: int, label: int) -> float:
    labels = torch.full_like(inputs["input_ids"], IGNORED)
    labels[:, place] = label
    with probing.evaluating(model):
        output = model(**inputs, labels=labels)
    loss = output[0] if isinstance(output, tuple) else output.loss
    return float(loss)
