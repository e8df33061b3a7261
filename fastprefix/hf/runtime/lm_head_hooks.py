"""Hooks that add a position in front of each row for the language model's head.

A prompt's last token predicts the row's first token. Its hidden state is put in front of the rows, so that the loss
counts that prediction, and its logits are removed again.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastprefix.hf.model.facts import ModelFacts
from fastprefix.hf.model.next_token_loss import IGNORED, predicts_next_token
from fastprefix.hf.model.probing import evaluating
from fastprefix.hf.runtime.forward_context import ForwardContext, ForwardState
from fastprefix.hf.runtime.forward_lock import ForwardLock
from fastprefix.hf.runtime.insertion.places import is_marker, refuse_ambiguous
from fastprefix.hf.runtime.selection import Selection
from fastprefix.prefixes.prompt import Place


def keeps_some(kwargs: dict[str, Any]) -> bool:
    """Whether a forward asks for the logits of only some positions (``logits_to_keep``)."""
    keep = kwargs.get("logits_to_keep")
    return isinstance(keep, Tensor) or bool(keep)


@dataclass
class _PromptPosition:
    """The extra position in front of each row of the running forward, for the prompt's last token."""

    labelled: bool  # whether a loss is computed
    length: int = 0  # 1 + S, the extra position and the row's tokens
    padding: Tensor | None = None  # [B], padding places before each row's first token


class LMHeadHooks:
    """Hooks on the outermost model: they lengthen the labels by one and cut the extra position from the logits."""

    def __init__(self, facts: ModelFacts, selection: Selection, forward: ForwardState, lock: ForwardLock) -> None:
        self.facts, self.selection, self.forward, self.lock = facts, selection, forward, lock
        self.position: _PromptPosition | None = None  # the running forward's
        self.handles: list[Any] = []
        model, layers = facts.model, facts.layers
        if len(layers.stacks) > 1 or not predicts_next_token(model, layers.main):
            return
        self.arguments = tuple(inspect.signature(model.forward).parameters)
        self.handles = [
            model.register_forward_pre_hook(self.before, with_kwargs=True),
            model.register_forward_hook(self.after, always_call=True),
        ]

    def __bool__(self) -> bool:
        return bool(self.handles)

    @property
    def active(self) -> bool:
        """Whether the running forward adds a position in front of its rows."""
        return self.position is not None

    @contextmanager
    def prepending(self) -> Iterator[None]:
        """Put the prompts' hidden states in front of what the part around all layers returns inside the block."""
        self.position = _PromptPosition(labelled=False)
        try:
            yield
        finally:
            self.position = None

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self.handles:
            handle.remove()

    def loss_fits_mask(self) -> bool:
        """Whether the loss accepts labels one longer than the attention mask (Qwen2-Audio's loss reads both)."""
        model, stack = self.facts.model, self.facts.layers.main
        ids = stack.dummy_inputs(tokens=3)["input_ids"]

        def prepend(module: nn.Module, args: Any, output: Any) -> Any:
            return replace_hidden(output, torch.cat([output[0][:, :1], output[0]], 1))

        handle = stack.owner.register_forward_hook(prepend)
        try:
            with self.forward.bypass(), evaluating(model):
                model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=torch.cat([ids[:, :1], ids], 1))
        except (IndexError, RuntimeError, ValueError):
            return False
        finally:
            handle.remove()
        return True

    def before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before a forward: put an ignored label in front of the rows' labels."""
        if self.forward.nested is not None:
            return None
        self.position = self.forward.labels = None
        if self.forward.bypassed or not self.selection.has_prompts():
            return None
        kwargs = {**dict(zip(self.arguments, args, strict=False)), **kwargs}
        if (place := self.selection.inner_place()) is not None:
            return (), self._with_labels_of_text(place, kwargs)
        labels = kwargs.get("labels")
        past = kwargs.get("past_key_values")
        continues = past is not None and past.get_seq_length() > 0
        if continues or keeps_some(kwargs) or kwargs.get("shift_labels") is not None:
            return None
        if labels is None and self.selection.shared is None:
            return None
        self.position = _PromptPosition(labelled=labels is not None)
        if labels is not None:
            labels = labels.clone()
            prompted = self.selection.prompted_rows(labels.shape[0])
            if prompted is not None:
                labels[~prompted.to(labels.device), 0] = IGNORED
            kwargs["labels"] = torch.cat([labels.new_full((labels.shape[0], 1), IGNORED), labels], 1)
        return (), kwargs

    def _with_labels_of_text(self, place: Place, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a forward with a prompt inside its rows: a marker's label does not count."""
        refuse_ambiguous(place, kwargs, trains=self.facts.model.training and torch.is_grad_enabled())
        labels = self.forward.labels = kwargs.get("labels")
        if labels is not None and place != "after":
            kwargs["labels"] = labels.masked_fill(is_marker(place, kwargs.get("input_ids")), IGNORED)
        return kwargs

    def prepend_hidden(self, output: Any, last: Tensor) -> Any:
        """Put the prompt's last hidden state in front of the hidden states ``[B, S, d]`` of a forward's output."""
        hidden = output[0]
        first = last.to(hidden.dtype)[:, None].expand(hidden.shape[0], 1, -1)
        return replace_hidden(output, torch.cat([first, hidden], 1))

    def move_past_left_padding(self, output: Any, context: ForwardContext) -> Any:
        """In left-padded rows, move the prompt's hidden state right up to the row's first real token."""
        assert self.position is not None
        self.position.padding, self.position.length = context.padding, output[0].shape[1]
        if context.padding is None:
            return output
        hidden = output[0]
        places = torch.arange(hidden.shape[1], device=hidden.device)
        here = (places == context.padding.to(hidden.device)[:, None])[..., None]  # [B, 1 + S, 1]
        return replace_hidden(output, torch.where(here, hidden[:, :1], hidden))

    def after(self, model: nn.Module, args: Any, output: Any) -> Any:
        """After a forward: cut the extra position from the output, and keep its logits for ``shared_prompt``."""
        if self.forward.nested is not None or not self.lock.held_by_me():
            return None
        position, self.position = self.position, None
        self.forward.labels = None
        if position is None or output is None:
            return None
        length = position.length
        if isinstance(output, tuple):
            at = 1 if position.labelled else 0
            logits = output[at] if len(output) > at else None
            output = tuple(_without_first(x, length) if i == at else x for i, x in enumerate(output))
        else:
            # A loss fused with the head returns no logits, but perhaps other tensors with one value per token.
            logits = output.get("logits")
            for name, x in list(output.items()):
                if name in ("logits", "last_hidden_state") or (isinstance(x, Tensor) and x.dim() == 2):
                    output[name] = _without_first(x, length)
        if self.selection.shared is not None and isinstance(logits, Tensor):
            rows = torch.arange(len(logits), device=logits.device)
            at_prompt = torch.zeros_like(rows) if position.padding is None else position.padding.to(rows.device)
            self.selection.shared.predict(logits[rows, at_prompt])
        return output


def _without_first(x: Any, length: int) -> Any:
    """Drop the first of ``[B, 1 + S, ...]`` positions; a value of any other shape is returned unchanged."""
    return x[:, 1:] if isinstance(x, Tensor) and x.dim() > 1 and x.shape[1] == length else x


def replace_hidden(output: Any, hidden: Tensor) -> Any:
    """A forward's output with its hidden states replaced."""
    if isinstance(output, tuple):
        return (hidden, *output[1:])
    output[next(iter(output.keys()))] = hidden
    return output
