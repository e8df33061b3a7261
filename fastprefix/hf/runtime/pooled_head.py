"""Heads that pool a bidirectional model's text at one place: behind a concatenated prompt it is the prompt's first.

That is what concatenation gives, and PEFT. So such a head is given the prompt's hidden states too, and what the model
returns for every token is cut behind it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastprefix.hf.model import layers as model_layers
from fastprefix.hf.model import probing
from fastprefix.hf.runtime.lm_head_hooks import replace_hidden

_STATES = ("last_hidden_state", "start_logits", "end_logits")  # by token, beside what is pooled


class PooledHead:
    """A hook on a model whose head pools; none on others."""

    def __init__(self, model: nn.Module, stack: model_layers.AttentionStack) -> None:
        self.tokens = 0  # of the prompt in the forward that runs
        self.length = 0  # P + S, of the prompt and the rows
        self.handles: list[Any] = []
        if not stack.causal and stack.owner is not model and not stack.extra_inputs and pools(model, stack):
            self.handles.append(model.register_forward_hook(self.after, always_call=True))

    def __bool__(self) -> bool:
        return bool(self.handles)

    def cut_next(self, tokens: int, length: int) -> None:
        """Cut the first ``tokens`` of ``length`` places from the output of the running forward."""
        self.tokens, self.length = tokens, length

    def after(self, model: nn.Module, args: Any, output: Any) -> Any:
        """What the model returns for every token, of the rows' own."""
        tokens, self.tokens = self.tokens, 0
        if not tokens or output is None or isinstance(output, tuple):
            return None
        return _behind(output, tokens, self.length)

    def remove(self) -> None:
        """Take the hook off."""
        for handle in self.handles:
            handle.remove()


def _behind(output: Any, tokens: int, length: int) -> Any:
    """An output without the first of so many tokens; a model of texts and images has its towers' outputs in its own."""
    for name, x in list(output.items()):
        if name in _STATES and isinstance(x, Tensor) and x.shape[1] == length:
            output[name] = x[:, tokens:]
        elif hasattr(x, "items"):
            output[name] = _behind(x, tokens, length)
    return output


def reads_each_token(model: Any, stack: model_layers.AttentionStack) -> bool:
    """Whether what a head says of a token is told by that token's hidden state: the first one's can be cut off then."""
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
    """Whether a model's own output has something of one place of its text, and no logits of every token."""
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
