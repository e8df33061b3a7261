"""WordNet's glosses of nouns for SmolLM2: batches to train on, and the loss of a held-out gloss token."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

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


def heldout_batches(tokenizer: Any, limit: int, rows: int = 4) -> list[Batch]:
    """The first ``limit`` held-out pairs, at most 200, in batches of ``rows`` that are about equally long."""
    return [encode_pairs(batch, tokenizer) for batch in _alike(load_glosses("heldout", limit), rows)]


def _alike(pairs: list[Pair], rows: int) -> list[list[Pair]]:
    """Batches of pairs of about one length, which need little padding."""
    pairs = sorted(pairs, key=lambda pair: len(pair["prompt"] + pair["completion"]))
    return [pairs[first : first + rows] for first in range(0, len(pairs), rows)]


def completion_loss(model: Any, batch: Batch) -> Tensor:
    """The mean loss of a completion token in nats: ``model(**batch).loss``, without logits for the prompts' tokens.

    They are a fifth of what SmolLM2 computes. Logits begin where the shortest prompt ends.
    """
    labels = batch["labels"]
    first = int((labels != IGNORE_INDEX).any(0).nonzero()[0])
    read = {name: x for name, x in batch.items() if name != "labels"}
    logits = model(**read, use_cache=False, logits_to_keep=labels.shape[1] - first + 1).logits
    return cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, first:].flatten(), ignore_index=IGNORE_INDEX)


def measured_at(steps: int, every: int) -> list[int]:
    """In front of the first step, after every ``every`` steps and after the last."""
    return [step for step in range(steps + 1) if step % every == 0 or step == steps]


@torch.no_grad()
def heldout_loss(model: Any, batches: list[Batch]) -> float:
    """The mean loss of a completion token in nats, the end of the text included."""
    total, count = 0.0, 0
    for batch in batches:
        tokens = int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())
        total += completion_loss(model, batch).item() * tokens
        count += tokens
    return total / count
