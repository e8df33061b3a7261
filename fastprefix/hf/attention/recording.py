"""Shows the arguments with which each layer calls the operator, so that one forward shows a model's layers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class AttentionCall(NamedTuple):
    """The arguments with which one layer called the operator."""

    module: nn.Module
    tensors: dict[str, Tensor]  # q, k, v, prefix_k, prefix_v
    options: dict[str, Any]


class _Recorders(threading.local):
    """The open blocks of this thread, as another thread may run another model."""

    def __init__(self) -> None:
        self.open: list[Callable[[AttentionCall], None]] = []


_recorders = _Recorders()


@contextmanager
def recording() -> Iterator[list[AttentionCall]]:
    """Collect every call of the attention function inside the block, in order."""
    calls: list[AttentionCall] = []
    with observing(calls.append):
        yield calls


@contextmanager
def observing(see: Callable[[AttentionCall], None]) -> Iterator[None]:
    """Hand every call of the attention function inside the block to ``see``, and keep none."""
    _recorders.open.append(see)
    try:
        yield
    finally:
        _recorders.open.pop()


def is_recording() -> bool:
    """Whether this thread has such a block open; never inside a compiled graph."""
    return bool(_recorders.open) and not torch.compiler.is_compiling()


def record(call: AttentionCall) -> None:
    """Hand a call to the innermost open block of this thread; call only while :func:`is_recording`."""
    _recorders.open[-1](call)
