"""Tests by running it whether a model's loss is that of predicting the next token; class names do not tell."""

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
    """Whether the loss compares position i's logits with label i + 1, so that a prompt predicts a row's first token.

    In that case the first token's label has no effect on the loss, and the last token's has. If the test cannot run (a
    forward without labels, or with labels of another shape), a model that can ``generate`` counts as one.
    """
    if stack.owner is model or stack.main_input != "input_ids":
        return False
    inputs = {**stack.dummy_inputs(_TOKENS)}
    if "labels" not in inspect.signature(model.forward).parameters:
        return bool(model.can_generate())
    try:
        first, last = (_loss(model, inputs, place, label=1) for place in (0, _TOKENS - 1))
        if first != first and last == last:  # the first label did not count: the mean over no tokens is nan
            return True
        other_first, other_last = (_loss(model, inputs, place, label=2) for place in (0, _TOKENS - 1))
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
        return bool(model.can_generate())  # such as a classifier, whose labels are [B]
    return first == other_first and last != other_last


def _loss(model: nn.Module, inputs: dict[str, Tensor], place: int, label: int) -> float:
    labels = torch.full_like(inputs["input_ids"], IGNORED)
    labels[:, place] = label
    with probing.evaluating(model):
        output = model(**inputs, labels=labels)
    loss = output[0] if isinstance(output, tuple) else output.loss
    return float(loss)
