"""``ensemble``: what several prefixes say about the same rows, in one batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastprefix.errors import fail
from fastprefix.hf.adapters.lookup import require_installation
from fastprefix.hf.adapters.prefix_batch import prefix_batch


class Ensemble(NamedTuple):
    """The result of :func:`ensemble`: N members, B rows; ``...`` is a row's tokens, where each has logits."""

    logits: Tensor  # [N, B, ..., C], each member's
    probabilities: Tensor  # [B, ..., C], the members' mean
    votes: Tensor  # [B, ...], the class that most members say; of several such, the most probable


def ensemble(model: Any, names: Sequence[str | tuple[str, ...] | None], **inputs: Any) -> Ensemble:
    """Let several prefixes vote on each row of a batch (prompt ensembling, Lester et al. 2021, section 5).

    The rows run once for each member, all in one batch of the one frozen model, where an ensemble of models needs N of
    them. Gradients flow to every member that is trained.

    Args:
        model: with the prefixes or soft prompts attached or registered, or a patched PEFT model; its output has logits.
        names: N members, as for :func:`prefix_batch`; None is the bare model.
        inputs: the model's keyword arguments for B rows. Tensors of B rows are repeated for each member; no labels.

    Raises:
        ValueError: a name is unknown, ``names`` is empty, or there are labels, a cache or no rows.
    """
    installation = require_installation(model)
    if isinstance(names, str) or not isinstance(names, Sequence) or not names:
        raise fail("names", repr(names), "a list of names, one for each member")
    for argument in ("labels", "past_key_values"):
        if inputs.get(argument) is not None:
            raise fail(argument, type(inputs[argument]).__name__, "none: a vote is on what the rows' logits say")
    rows = installation.facts.layers.batch_size(inputs)

    def of_all_members(name: str, x: Any) -> Any:
        if not isinstance(x, Tensor) or x.dim() < 2:  # one number for each place, as many as rows only by chance
            return x
        # Positions of several kinds are [kinds, B, S].
        axis = x.dim() - 2 if name == "position_ids" else 0
        return torch.cat([x] * len(names), axis) if x.shape[axis] == rows else x

    with prefix_batch(model, names):
        output = model(**{name: of_all_members(name, x) for name, x in inputs.items()})
    logits = output.logits.unflatten(0, (len(names), rows))
    probabilities = logits.float().softmax(-1).mean(0)
    counts = torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).sum(0)  # [B, ..., C]
    # A probability is at most 1, so that it decides between equal counts alone.
    votes = (counts + 0.5 * probabilities.detach()).argmax(-1)
    return Ensemble(logits, probabilities, votes)
