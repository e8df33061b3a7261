"""Heads that pool one position of a bidirectional model's text, such as the first token (``[CLS]``).

With a concatenated prompt the first token is the prompt's, as in PEFT. Such a head therefore receives the prompt's
hidden states too, and the per-token outputs are cut to the rows' own tokens after the head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastprefix.hf.model import layers as model_layers
from fastprefix.hf.model import probing
from fastprefix.hf.runtime.lm_head_hooks import replace_hidden

_STATES = ("last_hidden_state", "start_logits", "end_logits")  # outputs per token, next to the pooled ones


class PooledHead:
    """A hook on a model with a pooling head, which cuts the prompt from the output; no hook on other models."""

    def __init__(self, model: nn.Module, stack: model_layers.AttentionStack) -> None:
        self.tokens = 0  # prompt tokens P in the running forward
        self.length = 0  # P + S, tokens of the prompt and a row
        self.handles: list[Any] = []
        if not stack.causal and stack.owner is not model and not stack.extra_inputs and pools(model, stack):
            self.handles.append(model.register_forward_hook(self.after, always_call=True))

    def __bool__(self) -> bool:
        return bool(self.handles)

    def cut_next(self, tokens: int, length: int) -> None:
        """Cut the first ``tokens`` of ``length`` places from the output of the running forward."""
        self.tokens, self.length = tokens, length

    def after(self, model: nn.Module, args: Any, output: Any) -> Any:
        """After a forward: cut the prompt's positions from the per-token outputs."""
        tokens, self.tokens = self.tokens, 0
        if not tokens or output is None or isinstance(output, tuple):
            return None
        return _drop_first(output, tokens, self.length)

    def remove(self) -> None:
        """Take the hook off."""
        for handle in self.handles:
            handle.remove()


def _drop_first(output: Any, tokens: int, length: int) -> Any:
    """Drop the first ``tokens`` positions of an output, and of the outputs inside it (text and vision towers)."""
    for name, x in list(output.items()):
        if name in _STATES and isinstance(x, Tensor) and x.shape[1] == length:
            output[name] = x[:, tokens:]
        elif hasattr(x, "items"):
            output[name] = _drop_first(x, tokens, length)
    return output


def reads_each_token(model: Any, stack: model_layers.AttentionStack) -> bool:
    """Whether a head's output for a token depends on that token's hidden state alone, so the prompt's can be cut."""
    embeddings = model.get_input_embeddings()(stack.dummy_inputs(tokens=4)["input_ids"])

    def cut(module: nn.Module, args: Any, output: Any) -> Any:
        return replace_hidden(output, output[0][:, 1:])

    with probing.evaluating(model):
        whole = model(inputs_embeds=embeddings)
        handle = stack.owner.register_forward_hook(cut)
        try:
            rest = model(inputs_embeds=embeddings)
        finally:
            handle.remove()
    pairs = [(x, rest[name]) for name, x in whole.items() if isinstance(x, Tensor) and x.shape[1:2] == (4,)]
    return all(torch.equal(x[:, 1:], y) or torch.allclose(x[:, 1:], y, rtol=1e-3, atol=1e-3) for x, y in pairs)


def pools(model: Any, stack: model_layers.AttentionStack) -> bool:
    """Whether a model's output has a value for the whole text, and no per-token values but ``_STATES``."""
    if stack.main_input != "input_ids":
        return False
    shapes = []
    for tokens in (3, 4):
        with probing.evaluating(model):
            output = model(**stack.dummy_inputs(tokens))
        if not hasattr(output, "items"):
            return False
        shapes.append({name: list(x.shape) for name, x in output.items() if isinstance(x, Tensor)})
    few, many = shapes
    by_token = {name for name in few if few[name] != many.get(name)}
    return by_token <= set(_STATES) and bool(set(few) - by_token)
