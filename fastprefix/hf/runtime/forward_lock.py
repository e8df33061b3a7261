"""Serialises the forwards of one model: a forward keeps its context in the model, which threads share."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fastprefix.errors import fail
from fastprefix.hf.model.layers import AttentionStack

_CHECK_AFTER = 0.05  # seconds after which a waiting thread checks whether the owner still runs a forward


class ForwardLock:
    """A reentrant lock that hooks on a model acquire before each forward and release after it.

    A block (``prefix_batch``, ``shared_prompt``, PEFT's adapter names) selects prefixes for the thread that opened it.
    A forward of another thread raises: it must not read that selection, and waiting could deadlock, as the block may
    itself wait for that thread. Under ``torch.compile`` no lock is taken.
    """

    def __init__(self, model: nn.Module, stacks: Sequence[AttentionStack]) -> None:
        self.__setstate__({"modules": list(dict.fromkeys([model, *(stack.owner for stack in stacks)])), "handles": []})

    def __getstate__(self) -> dict[str, Any]:
        return {"modules": self.modules, "handles": self.handles}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.modules: list[nn.Module] = state["modules"]
        self.handles: list[Any] = state["handles"]
        self.condition = threading.Condition()
        self.owner: int | None = None  # the thread that holds the lock
        self.depth = 0  # how often the owner has acquired it
        self.released_in_finally = False  # by the owner; an interrupt may skip forward hooks
        self.block_owner: int | None = None  # the thread that has a block open

    def hook(self) -> None:
        """Hook the model around all hooks that it has: ``before`` runs first, ``after`` runs last."""
        for module in self.modules:
            self.handles.append(module.register_forward_pre_hook(self.before, prepend=True))
            self.handles.append(module.register_forward_hook(self.after, always_call=True))

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self.handles:
            handle.remove()

    def held_by_me(self) -> bool:
        """Whether this thread holds the lock; a compiled forward needs none."""
        return torch.compiler.is_compiling() or self.owner == threading.get_ident()

    def before(self, module: nn.Module, args: Any) -> None:
        """Acquire the lock before a forward; RuntimeError while another thread has a block open."""
        if torch.compiler.is_compiling():
            return
        if getattr(module, "_is_replica", False):
            expected = "DistributedDataParallel, or one device: replicas have no prefix of their own to read"
            raise fail("model", f"DataParallel's replica of {type(module).__name__}", expected)
        if self.block_owner not in (None, threading.get_ident()):
            raise RuntimeError(
                "fastprefix: another thread has a block open on this model, which chooses for that thread's forwards: "
                "open the block in the thread that runs the model, one at a time, or give each thread a copy"
            )
        self.acquire(released_in_finally=False)

    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        """Release the lock after a forward, also one that raised."""
        if not torch.compiler.is_compiling():
            self.release()

    def acquire(self, released_in_finally: bool) -> None:
        """Wait until no other thread holds the lock, then take it.

        ``released_in_finally``: whether the caller releases in a ``finally``. Otherwise a waiting thread takes the
        lock over once the owner's stack has no module call left on it.
        """
        me = threading.get_ident()
        with self.condition:
            while self.owner not in (None, me):
                notified = self.condition.wait(_CHECK_AFTER)
                if not notified and not self.released_in_finally and _runs_no_forward(self.owner):
                    break  # the owner was interrupted, or ended, before it could release the lock
            if self.owner != me:
                self.owner, self.depth, self.released_in_finally = me, 0, released_in_finally
            self.depth += 1

    def release(self) -> None:
        """Undo one :meth:`acquire`; the last undone lets the next thread in."""
        with self.condition:
            if self.owner == threading.get_ident():
                self.depth -= 1
                if self.depth <= 0:
                    self.owner = None
                    self.condition.notify()

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Hold the lock inside the block."""
        if torch.compiler.is_compiling():
            yield
            return
        self.acquire(released_in_finally=True)
        try:
            yield
        finally:
            self.release()

    @contextmanager
    def block(self) -> Iterator[None]:
        """Mark a block of this thread as open; ValueError where another thread has one open."""
        me = threading.get_ident()
        with self.hold():
            if self.block_owner not in (None, me):
                raise fail("model", "one on which another thread has a block open", "one block at a time, or a copy")
            outside, self.block_owner = self.block_owner, me
        try:
            yield
        finally:
            with self.hold():
                self.block_owner = outside


def _runs_no_forward(thread: int | None) -> bool:
    """Whether a thread's stack has no module call on it, or the thread has ended."""
    frame = sys._current_frames().get(thread) if thread is not None else None
    while frame is not None:
        if "_call_impl" in frame.f_code.co_name:
            return False
        frame = frame.f_back
    return True
