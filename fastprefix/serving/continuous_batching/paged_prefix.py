"""``PagedPrefix``: a prefix as pages hold it, and the placeholder ids that stand for its tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

_LARGEST = 2**31 - 1


class PagedPrefix:
    """Keys and values of P tokens in every layer.

    Attributes:
        ids: P placeholder ids, from -2^31 to -1, which are a function of the numbers.
        keys: of each layer ``[P, H_kv, D]``, in the cache's dtype and on its device.
        values: likewise.
    """

    def __init__(self, keys: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        self.keys, self.values = tuple(keys), tuple(values)
        self.ids = placeholders(digest([*keys, *values]), len(keys[0]))

    def __len__(self) -> int:
        return len(self.ids)

    def __deepcopy__(self, memo: Any) -> PagedPrefix:
        return self  # forked requests, which the engine copies, share the numbers


def digest(tensors: Sequence[Tensor]) -> bytes:
    """32 bytes that depend on every number, shape and dtype."""
    found = hashlib.sha256()
    for x in tensors:
        found.update(f"{x.dtype} {list(x.shape)} ".encode())
        found.update(x.detach().contiguous().cpu().flatten().view(torch.uint8).numpy().data)
    return found.digest()


def placeholders(of: bytes, tokens: int) -> tuple[int, ...]:
    """Ids that a digest determines, and that no text has: all are negative. A page's hash takes 32-bit ids."""
    drawn = np.frombuffer(hashlib.shake_256(of).digest(4 * tokens), dtype="<u4")
    return tuple(int(x) for x in -1 - (drawn & _LARGEST).astype(np.int64))


def count_placeholders(ids: Sequence[int]) -> int:
    """How many placeholder ids stand in front of a request's tokens."""
    return next((i for i, token in enumerate(ids) if token >= 0), len(ids))
