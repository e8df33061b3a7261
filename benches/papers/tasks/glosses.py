"""WordNet's glosses of nouns for SmolLM2: batches to train on, and the loss of a held-out gloss token."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastprefix.assets.glosses import load_glosses
from fastprefix.data import IGNORE_INDEX, encode_pairs

Batch = dict[str, Tensor]


def training_batches(tokenizer: Any, steps: int, rows: int, seed: int) -> Iterator[Batch]:
    """``steps`` batches of ``rows`` pairs, in an order that ``seed`` decides; 1,000 pairs are there to train on."""
    pairs = load_glosses("train")
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        chosen = torch.randperm(len(pairs), generator=generator)[:rows].tolist()
        yield encode_pairs([pairs[i] for i in chosen], tokenizer)


def heldout_batches(tokenizer: Any, limit: int, rows: int = 4) -> list[Batch]:
    """The first ``limit`` held-out pairs, at most 200, in batches of ``rows`` that are about equally long."""
    pairs = sorted(load_glosses("heldout", limit), key=lambda pair: len(pair["prompt"] + pair["completion"]))
    return [encode_pairs(pairs[first : first + rows], tokenizer) for first in range(0, len(pairs), rows)]


def measured_at(steps: int, every: int) -> list[int]:
    """In front of the first step, after every ``every`` steps and after the last."""
    return [step for step in range(steps + 1) if step % every == 0 or step == steps]


@torch.no_grad()
def heldout_loss(model: Any, batches: list[Batch]) -> float:
    """The mean loss of a completion token in nats, the end of the text included."""
    total, count = 0.0, 0
    for batch in batches:
        tokens = int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())
        total += model(**batch, use_cache=False).loss.item() * tokens
        count += tokens
    return total / count
