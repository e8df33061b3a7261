"""The language a^n b^n (Reizinger et al. 2024, 2405.01964): its prompts inside and outside, completions and rules."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import GPT2LMHeadModel

from benches.papers.tasks.small_transformer import gpt2
from fastprefix.data import IGNORE_INDEX

A, B, START, END = range(4)
PROMPT = 8  # letters of a prompt
Batch = tuple[Tensor, Tensor]  # ids and labels
Kind = Literal["extrapolation", "adversarial"]


@dataclass(frozen=True)
class Size:
    """A model, and the longest text that it reads."""

    width: int = 16
    heads: int = 4
    layers: int = 3
    inner: int = 128
    letters: int = 32
    dropout: float = 0.0


def build(size: Size, seed: int) -> GPT2LMHeadModel:
    """A GPT-2 of this size, whose vocabulary is two letters, a start and an end."""
    sizes = {"n_embd": size.width, "n_layer": size.layers, "n_head": size.heads, "n_inner": size.inner}
    return gpt2(seed, 4, size.letters + 2, size.dropout, **sizes)


def prompts() -> tuple[Tensor, Tensor]:
    """All prompts of 8 letters: ``[5, 8]`` that begin a text of the language, and ``[251, 8]`` that do not."""
    every = torch.tensor(list(itertools.product((A, B), repeat=PROMPT)))
    inside = a_before_b(every) & (every == A).sum(1).ge(PROMPT / 2)
    return every[inside], every[~inside]


def a_before_b(x: Tensor) -> Tensor:
    """Of each row, whether no a follows a b."""
    return ~((x[:, :-1] == B) & (x[:, 1:] == A)).any(1)


def balanced(x: Tensor) -> Tensor:
    """Of each row, whether it has as many a as b."""
    return (x == A).sum(1) == (x == B).sum(1)


def halves(outside: Tensor) -> tuple[Tensor, Tensor]:
    """Prompts to train on and others to test on: every other one of those with equally many a."""
    order = (outside == A).sum(1).argsort(stable=True)
    return outside[order[0::2]], outside[order[1::2]]


def completed(prompt: list[int], kind: Kind) -> list[int]:
    """The letters that a prompt lacks to be balanced; adversarially, one b too many behind them."""
    surplus = prompt.count(A) - prompt.count(B)
    added = [B] * surplus if surplus > 0 else [A] * -surplus
    return [*prompt, *added, *([B] if kind == "adversarial" else [])]


def encoded(texts: list[list[int]], letters: int, unseen: int = 0) -> tuple[Tensor, Tensor]:
    """Ids and labels ``[rows, letters + 2]`` of texts with a start and an end; the first letters may have no loss."""
    ids = torch.full((len(texts), letters + 2), END)
    labels = torch.full_like(ids, IGNORE_INDEX)
    for row, text in enumerate(texts):
        whole = torch.tensor([START, *text, END])
        ids[row, : len(whole)] = whole
        labels[row, 1 + unseen : len(whole)] = whole[1 + unseen :]
    return ids, labels


def language(letters: int) -> tuple[Tensor, Tensor]:
    """Every text of the language with so many letters at most, each once: the distribution that is learned."""
    return encoded([[A] * n + [B] * n for n in range(1, letters // 2 + 1)], letters)


def entropy(letters: int) -> float:
    """The least loss of a token that a model of the language can have, in nats: one number n is to be guessed."""
    count = letters // 2
    return math.log(count) / (count + 2)  # a text has 2n + 1 tokens, on average count + 2


def loss(model: Any, ids: Tensor, labels: Tensor, outside: int = 0) -> Tensor:
    """The mean loss of a token that has a label; that of the last ``outside`` rows is a mean of its own and added."""
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    first = len(ids) - outside
    parts = [slice(0, first), slice(first, None)] if outside else [slice(None)]
    means = [
        cross_entropy(logits[part].flatten(0, 1), labels[part, 1:].flatten(), ignore_index=IGNORE_INDEX)
        for part in parts
    ]
    return torch.stack(means).sum()


def mixed_batches(given: Tensor, kind: Kind, letters: int, steps: int, rows: int, seed: int) -> Iterator[Batch]:
    """The whole language, and behind it ``rows`` completions of prompts, drawn anew in each step."""
    ids, labels = language(letters)
    more_ids, more_labels = encoded([completed(prompt, kind) for prompt in given.tolist()], letters, PROMPT)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        chosen = torch.randperm(len(given), generator=generator)[:rows]
        yield torch.cat([ids, more_ids[chosen]]), torch.cat([labels, more_labels[chosen]])


@dataclass(frozen=True)
class Rates:
    """Of the greedy completions of prompts, in percent."""

    equal: float  # as many a as b in the whole text, of those that end
    ended: float
    ordered: float  # no a behind a b in what is written


@torch.no_grad()
def rates(model: Any, given: Tensor, letters: int) -> Rates:
    """Complete prompts greedily until all have ended or have as many letters as the model reads."""
    model.eval()
    ids = torch.cat([torch.full((len(given), 1), START), given], 1)
    ended = torch.zeros(len(ids), dtype=torch.bool)
    while ids.shape[1] < letters + 2 and not ended.all():
        token = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[:, -1].argmax(-1)
        token = torch.where(ended, END, token)
        ended = ended | (token == END)
        ids = torch.cat([ids, token[:, None]], 1)
    equal = balanced(ids[ended]).double().mean().item() if ended.any() else 0.0
    ordered = a_before_b(ids[:, 1 + given.shape[1] :]).double().mean().item()
    return Rates(100.0 * equal, 100.0 * ended.double().mean().item(), 100.0 * ordered)
