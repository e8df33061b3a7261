"""How well a prefix stands for the whole text, on held-out conversations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch

from fastprefix.cartridges.batches import Example, collate, on, predictions
from fastprefix.cartridges.targets import Targets, distillation_loss, targets_of
from fastprefix.hf.api import prefix_batch
from fastprefix.hf.model import probing

Name = str | tuple[str, ...]


@dataclass(frozen=True)
class Measured:
    """Means over the trained tokens of some conversations."""

    loss: float  # nats a token of the conversation
    divergence: float  # nats, KL from what the model with the whole text predicts; see targets.py
    agreement: float  # share of tokens whose likeliest prediction is that of the model with the whole text

    def fields(self) -> dict[str, float]:
        """As JSON."""
        return asdict(self)


@contextmanager
def reads(model: Any, names: Sequence[Name] | None, documents: Sequence[int], packed: bool) -> Iterator[None]:
    """Let each row read the prefix of its document inside the block; None reads whatever is active.

    A packed batch is one row, so all of its conversations are about one document.
    """
    if names is None:
        yield
        return
    chosen = [names[i] for i in (documents[:1] if packed else documents)]
    with prefix_batch(model, chosen):
        yield


@torch.no_grad()
def measure(
    model: Any, examples: Sequence[Example], batch_size: int, packed: bool, names: Sequence[Name] | None = None
) -> Measured:
    """Measure examples that have targets, with the active prefix or with the ones that are named."""
    sums = torch.zeros(3, dtype=torch.float64)
    with probing.evaluating(model):
        for batch in _batches(model, examples, batch_size, packed):
            targets = Targets(**batch["targets"])
            with reads(model, names, batch["documents"], packed):
                logits = predictions(model, batch)
            same = (logits.argmax(-1) == targets.ids[:, 0]).sum()
            loss = torch.nn.functional.cross_entropy(logits.float(), batch["labels"], reduction="sum")
            sums += torch.stack([x.double().cpu() for x in (loss, distillation_loss(logits, targets).sum(), same)])
    loss, divergence, same = (sums / _count(examples)).tolist()
    return Measured(loss, divergence, same)


def of_text(examples: Sequence[Example]) -> Measured:
    """The model with the whole text, which the targets come from."""
    label = sum(float(e.targets.label.sum()) for e in examples if e.targets is not None)
    return Measured(-label / _count(examples), 0.0, 1.0)


@torch.no_grad()
def targets(model: Any, examples: Sequence[Example], batch_size: int, packed: bool, top_k: int) -> list[Targets]:
    """What the model with the active prefix predicts of each example's trained tokens."""
    found = []
    with probing.evaluating(model):
        for batch in _batches(model, examples, batch_size, packed):
            found.append(targets_of(predictions(model, batch), batch["labels"], top_k).to(torch.device("cpu")))
    return found


def _batches(model: Any, examples: Sequence[Example], batch_size: int, packed: bool) -> Iterator[dict[str, Any]]:
    for first in range(0, len(examples), batch_size):
        yield on(collate(examples[first : first + batch_size], packed), model.device)


def _count(examples: Sequence[Example]) -> int:
    return sum(len(example.labels) for example in examples)
