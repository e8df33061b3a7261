"""Rows of conversations as a cartridge is trained on them: packed where the model allows it, else padded."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastprefix.cartridges.targets import Targets, join
from fastprefix.data import IGNORE_INDEX, Row
from fastprefix.errors import fail


@dataclass(frozen=True)
class Example:
    """One row of a conversation about one document."""

    input_ids: Tensor  # [L], without what follows the last trained token
    places: Tensor  # [n], where the trained tokens are predicted: each one's place less 1
    labels: Tensor  # [n], the trained tokens
    document: int = 0
    targets: Targets | None = None

    @property
    def prompt(self) -> list[int]:
        """Token ids of what stands in front of the first trained token."""
        return [int(i) for i in self.input_ids[: int(self.places[0]) + 1].tolist()]


def examples_of(rows: Sequence[Row], document: int = 0) -> list[Example]:
    """The rows with at least one trained token that something stands in front of.

    Raises:
        ValueError: there is no such row.
    """
    found = []
    for row in rows:
        trained = (row["labels"] != IGNORE_INDEX).nonzero()[:, 0]
        trained = trained[trained > 0]
        if len(trained):
            last = int(trained[-1])
            found.append(Example(row["input_ids"][:last], trained - 1, row["labels"][trained], document))
    if not found:
        raise fail("conversations", "no token to train on", "at least one, after a question")
    return found


def collate(examples: Sequence[Example], packed: bool) -> dict[str, Any]:
    """A batch: the inputs of the model, and where in its logits ``[B * S, V]`` the predictions of trained tokens are.

    Args:
        examples: with their targets, or all without.
        packed: all in one row, told apart by position ids that begin anew; else padded on the right.
    """
    rows = [example.input_ids for example in examples]
    sizes = torch.tensor([len(row) for row in rows])
    if packed:
        ids, firsts = torch.cat(rows)[None], sizes.cumsum(0) - sizes
        inputs = {"input_ids": ids, "position_ids": torch.cat([torch.arange(int(size)) for size in sizes])[None]}
    else:
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        firsts = torch.arange(len(rows)) * ids.shape[1]
        inputs = {"input_ids": ids, "attention_mask": (torch.arange(ids.shape[1]) < sizes[:, None]).long()}
    batch: dict[str, Any] = {
        "inputs": inputs,
        "places": torch.cat([example.places + first for example, first in zip(examples, firsts, strict=True)]),
        "labels": torch.cat([example.labels for example in examples]),
        "documents": [example.document for example in examples],
    }
    given = [example.targets for example in examples if example.targets is not None]
    return {**batch, "targets": vars(join(given))} if given else batch


def predictions(model: Any, batch: dict[str, Any]) -> Tensor:
    """``[n, V]`` logits that predict a batch's trained tokens."""
    inputs, places = batch["inputs"], batch["places"]
    if len(inputs["input_ids"]) == 1 and "logits_to_keep" in inspect.signature(model.forward).parameters:
        logits: Tensor = model(**inputs, use_cache=False, logits_to_keep=places).logits[0]
        return logits
    return model(**inputs, use_cache=False).logits.flatten(0, 1)[places]


def on(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """A batch whose tensors are on a device."""
    moved: dict[str, Any] = {}
    for name, x in batch.items():
        moved[name] = x.to(device) if isinstance(x, Tensor) else on(x, device) if isinstance(x, dict) else x
    return moved
