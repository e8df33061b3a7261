"""The exact number of bytes that a forward saves for its backward, on any device, without an allocator's rounding."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor


class SavedBytes:
    """Counts the storages that autograd saves inside the ``with`` block, each once and at its full size.

    A view keeps its whole storage alive, so whole storages are counted. Tensors that a checkpointed region saves do not
    outlive the forward and are not counted; the region's inputs are.

    Args:
        exclude: tensors whose storages are not counted, in views (``weight.t()``) neither; usually
            ``model.parameters()``.

    Example::

        with SavedBytes(exclude=model.parameters()) as saved:
            loss = model(**batch).loss
        print(saved.total, "bytes")
    """

    def __init__(self, exclude: Iterable[Tensor] = ()) -> None:
        self._excluded = {_key(x): x for x in exclude}
        # The storages themselves are kept, since a freed address may be used again.
        self._storages: dict[int, torch.UntypedStorage] = {}
        self._hooks: torch.autograd.graph.saved_tensors_hooks | None = None
        self._closed = (0, 0)

    @property
    def total(self) -> int:
        """Bytes of all storages counted so far."""
        return self._closed[0] + sum(storage.nbytes() for storage in self._storages.values())

    @property
    def count(self) -> int:
        """Number of storages counted so far, without empty ones."""
        return self._closed[1] + sum(storage.nbytes() > 0 for storage in self._storages.values())

    def _pack(self, x: Tensor) -> Tensor:
        key = _key(x)
        if key not in self._excluded:
            self._storages.setdefault(key, x.untyped_storage())
        return x

    def __enter__(self) -> SavedBytes:
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack)
        self._hooks.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._hooks is not None
        self._hooks.__exit__(kind, error, trace)
        # The hooks refer back to this object: without this, the storages would live until the next garbage collection.
        self._closed = (self.total, self.count)
        self._storages.clear()
        self._hooks = None


def saved_bytes(fn: Callable[[], Any], exclude: Iterable[Tensor] = ()) -> int:
    """Bytes that one call of ``fn``, a forward, saves for its backward; see :class:`SavedBytes`."""
    with SavedBytes(exclude) as saved:
        kept = fn()
    total = saved.total
    del kept
    return total


def _key(x: Tensor) -> int:
    return int(x.untyped_storage()._cdata)


def _unpack(x: Tensor) -> Tensor:
    return x
