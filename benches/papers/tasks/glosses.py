"""WordNet's glosses of nouns for SmolLM2: batches to train on, and the loss of a held-out gloss token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import fastprefix
from fastprefix.assets.glosses import load_glosses
from fastprefix.data import IGNORE_INDEX, encode_pairs

Batch = dict[str, Tensor]
Pair = dict[str, str]


def training_batches(tokenizer: Any, steps: int, rows: int, seed: int) -> Iterator[Batch]:
    """``steps`` batches of ``rows`` pairs that are about equally long, in an order that ``seed`` decides.

    The pairs are drawn from 1,000, none of them twice before all were drawn.
    """
    pairs = load_glosses("train")
    generator = torch.Generator().manual_seed(seed)
    rounds = -(-steps * rows // len(pairs))
    drawn = torch.cat([torch.randperm(len(pairs), generator=generator) for _ in range(rounds)])[: steps * rows]
    batches = _alike([pairs[i] for i in drawn.tolist()], rows)
    for place in torch.randperm(steps, generator=generator).tolist():
        yield encode_pairs(batches[place], tokenizer)


def heldout_batches(tokenizer: Any, limit: int, rows: int = 8) -> list[Batch]:
    """The first ``limit`` held-out pairs, at most 200, in batches of ``rows`` that are about equally long."""
    return [encode_pairs(batch, tokenizer) for batch in _alike(load_glosses("heldout", limit), rows)]


def _alike(pairs: list[Pair], rows: int) -> list[list[Pair]]:
    """Batches of pairs of about one length, which need little padding."""
    pairs = sorted(pairs, key=lambda pair: len(pair["prompt"] + pair["completion"]))
    return [pairs[first : first + rows] for first in range(0, len(pairs), rows)]


def completion_loss(model: Any, batch: Batch, prefixes: Sequence[str] = ()) -> Tensor:
    """The mean loss of a completion token in nats, which is ``model(**batch).loss``.

    Logits, a fifth of what SmolLM2 computes for a token, begin where the shortest prompt ends. With ``prefixes``, names
    of attached ones, it is the loss of each, ``[n]``: one forward reads the batch once for each of them.
    """
    labels = batch["labels"]
    first = int((labels != IGNORE_INDEX).any(0).nonzero()[0])
    copies = max(1, len(prefixes))
    read = {name: x.repeat(copies, 1) for name, x in batch.items() if name != "labels"}
    rows = [name for name in prefixes for _ in labels]
    with fastprefix.prefix_batch(model, rows) if rows else nullcontext():
        # Indices copy the hidden states. A number would slice them, and a slice is multiplied row by row.
        logits = model(**read, use_cache=False, logits_to_keep=torch.arange(first - 1, labels.shape[1])).logits
    wanted = labels[:, first:].flatten()
    losses = [
        cross_entropy(part[:, :-1].flatten(0, 1), wanted, ignore_index=IGNORE_INDEX) for part in logits.chunk(copies)
    ]
    return torch.stack(losses) if prefixes else losses[0]


def measured_at(steps: int, every: int) -> list[int]:
    """In front of the first step, after every ``every`` steps and after the last."""
    return [step for step in range(steps + 1) if step % every == 0 or step == steps]


@torch.no_grad()
def heldout_losses(model: Any, batches: list[Batch], prefixes: Sequence[str] = ()) -> list[float]:
    """The mean loss of a completion token in nats, the end of the text included, of each of these prefixes."""
    tokens = [int((batch["labels"] != IGNORE_INDEX).sum()) for batch in batches]
    losses = torch.stack([completion_loss(model, batch, prefixes).reshape(-1) for batch in batches], -1)
    return ((losses * torch.tensor(tokens)).sum(-1) / sum(tokens)).tolist()


def heldout_loss(model: Any, batches: list[Batch]) -> float:
    """The mean loss of a completion token in nats, of the model as it is: with its active prefix, if it has one."""
    (loss,) = heldout_losses(model, batches)
    return loss
