"""A prompt's last token predicts a row's first one: what the model around the layers has to know of it."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastprefix.hf.model import layers as probe
from fastprefix.hf.model.next_token_loss import IGNORED, predicts_next_token

if TYPE_CHECKING:
    from fastprefix.hf.adapters.installation import Installation
    from fastprefix.hf.runtime.prefix_reader import Reading


def keeps_some(kwargs: dict[str, Any]) -> bool:
    """Whether only some positions' logits are asked for."""
    keep = kwargs.get("logits_to_keep")
    return isinstance(keep, Tensor) or bool(keep)


class HeadHooks:
    """Hooks on the model itself: one more position in front of the rows, for its loss, and out of the logits again."""

    def __init__(self, state: Installation) -> None:
        self.state = state
        self.wanted = False  # by the forward that runs
        self.labelled = False
        self.length = 0  # 1 + S, tokens of the rows and the place in front of them
        self.padding: Tensor | None = None  # [B], places in front of its rows
        self.handles: list[Any] = []
        model = state.model
        if len(state.layers.stacks) > 1 or not predicts_next_token(model, state.layers.main):
            return
        self.arguments = tuple(inspect.signature(model.forward).parameters)
        self.handles = [
            model.register_forward_pre_hook(self.before, with_kwargs=True),
            model.register_forward_hook(self.after, always_call=True),
        ]

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self.handles:
            handle.remove()

    def fits_mask(self) -> bool:
        """Whether a loss of labels one place longer runs beside a mask of the rows (Qwen2-Audio's reads both)."""
        model, stack = self.state.model, self.state.layers.main
        ids = stack.example(tokens=3)["input_ids"]

        def wider(module: nn.Module, args: Any, output: Any) -> Any:
            return replace_first(output, torch.cat([output[0][:, :1], output[0]], 1))

        self.state.paused = True
        handle = stack.owner.register_forward_hook(wider)
        try:
            with probe.evaluating(model):
                model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=torch.cat([ids[:, :1], ids], 1))
        except (IndexError, RuntimeError, ValueError):
            return False
        finally:
            handle.remove()
            self.state.paused = False
        return True

    def before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Give the labels one place more."""
        state = self.state
        if state.nested is not None:
            return None
        self.wanted = self.labelled = False
        if state.paused or not state.has_prompts():
            return None
        kwargs = {**dict(zip(self.arguments, args, strict=False)), **kwargs}
        labels = kwargs.get("labels")
        past = kwargs.get("past_key_values")
        continues = past is not None and past.get_seq_length() > 0
        if continues or keeps_some(kwargs) or kwargs.get("shift_labels") is not None:
            return None
        if labels is None and state.shared is None:
            return None
        self.wanted, self.labelled = True, labels is not None
        if labels is not None:
            labels = labels.clone()
            prompted = state.prompted_rows(labels.shape[0])
            if prompted is not None:
                labels[~prompted.to(labels.device), 0] = IGNORED
            kwargs["labels"] = torch.cat([labels.new_full((labels.shape[0], 1), IGNORED), labels], 1)
        return (), kwargs

    def widen(self, output: Any, last: Tensor) -> Any:
        """The hidden states ``[B, S, d]`` with the prompt's last one in front."""
        hidden = output[0]
        first = last.to(hidden.dtype)[:, None].expand(hidden.shape[0], 1, -1)
        return replace_first(output, torch.cat([first, hidden], 1))

    def behind_padding(self, output: Any, reading: Reading) -> Any:
        """The same; in rows padded on the left the prompt's last state stands in front of their first token."""
        self.padding, self.length = reading.padding, output[0].shape[1]
        if reading.padding is None:
            return output
        hidden = output[0]
        places = torch.arange(hidden.shape[1], device=hidden.device)
        here = (places == reading.padding.to(hidden.device)[:, None])[..., None]  # [B, 1 + S, 1]
        return replace_first(output, torch.where(here, hidden[:, :1], hidden))

    def after(self, model: nn.Module, args: Any, output: Any) -> Any:
        """Logits of the rows' own tokens; those in front of them are kept for whoever shares a prompt."""
        if self.state.nested is not None or not self.state.turns.mine():
            return None
        wanted, self.wanted = self.wanted, False
        if not wanted or output is None:
            return None
        length = self.length
        if isinstance(output, tuple):
            at = 1 if self.labelled else 0
            logits = output[at] if len(output) > at else None
            output = tuple(_behind_first(x, length) if i == at else x for i, x in enumerate(output))
        else:
            # A loss fused with the head makes no logits, but may tell something of every token.
            logits = output.get("logits")
            for name, x in list(output.items()):
                if name in ("logits", "last_hidden_state") or (isinstance(x, Tensor) and x.dim() == 2):
                    output[name] = _behind_first(x, length)
        if self.state.shared is not None and isinstance(logits, Tensor):
            rows = torch.arange(len(logits), device=logits.device)
            at_prompt = torch.zeros_like(rows) if self.padding is None else self.padding.to(rows.device)
            self.state.shared.next_logits = logits[rows, at_prompt]
        return output


def _behind_first(x: Any, length: int) -> Any:
    """What an output tells of ``[B, 1 + S]`` places, of the rows' own tokens; anything else as it is."""
    return x[:, 1:] if isinstance(x, Tensor) and x.dim() > 1 and x.shape[1] == length else x


def replace_first(output: Any, hidden: Tensor) -> Any:
    """A forward's output with other hidden states."""
    if isinstance(output, tuple):
        return (hidden, *output[1:])
    output[next(iter(output.keys()))] = hidden
    return output
