"""Rows of token ids and labels, and a collator that makes batches of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Row = dict[str, Tensor]
IGNORE_INDEX = -100


def row(ids: Sequence[int], trained: Sequence[bool]) -> Row:
    """A row of ``input_ids``, ``attention_mask`` and ``labels``, each ``[L]``; labels of untrained tokens are -100."""
    input_ids = torch.tensor(ids, dtype=torch.int64)
    labels = torch.where(torch.tensor(trained, dtype=torch.bool), input_ids, IGNORE_INDEX)
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "labels": labels}


def collator(pad_token_id: int) -> Callable[[Sequence[Row]], Row]:
    """A collator that pads rows on the right to the longest and stacks them: ``[B, L]``."""
    fills = {"input_ids": pad_token_id, "attention_mask": 0, "labels": IGNORE_INDEX}

    def collate(rows: Sequence[Row]) -> Row:
        return {
            name: torch.nn.utils.rnn.pad_sequence([row[name] for row in rows], batch_first=True, padding_value=fill)
            for name, fill in fills.items()
        }

    return collate
