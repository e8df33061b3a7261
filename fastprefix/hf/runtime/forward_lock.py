"""One forward of a model at a time: what it reads lies in the model, where another thread's would change it."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fastprefix.validation import fail

if TYPE_CHECKING:
    from fastprefix.hf.adapters.installation import Installation

_PATIENCE = 0.05  # seconds until a waiting thread looks what the other one is doing


class Turns:
    """Hooks around a model's own, the first and the last: threads wait for one another's forwards.

    A block (of prefix_batch, shared_prompt, adapter names) chooses for the thread that opened it. Another thread's
    forward must neither read that choice nor wait for a block that may itself wait for the thread: it raises.
    """

    def __init__(self, state: Installation) -> None:
        self.__setstate__({"handles": []})
        for module in dict.fromkeys([state.model, *(stack.owner for stack in state.layers.stacks)]):
            self.handles.append(module.register_forward_pre_hook(self.enter, prepend=True))
            self.handles.append(module.register_forward_hook(self.leave, always_call=True))

    def __getstate__(self) -> dict[str, Any]:
        return {"handles": self.handles}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.handles: list[Any] = state["handles"]
        self.changed = threading.Condition()
        self.holder: int | None = None  # the thread whose turn it is
        self.depth = 0  # how often it took it
        self.safe = False  # whether it gives it back for certain
        self.chooser: int | None = None  # the thread that has a block open

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self.handles:
            handle.remove()

    def mine(self) -> bool:
        """Whether it is this thread's turn; a compiled forward takes none."""
        return torch.compiler.is_compiling() or self.holder == threading.get_ident()

    def enter(self, module: nn.Module, args: Any) -> None:
        """Wait for this thread's turn; RuntimeError while another one has a block open."""
        if torch.compiler.is_compiling():
            return
        if getattr(module, "_is_replica", False):
            expected = "DistributedDataParallel, or one device: replicas have no prefix of their own to read"
            raise fail("model", f"DataParallel's replica of {type(module).__name__}", expected)
        if self.chooser not in (None, threading.get_ident()):
            raise RuntimeError(
                "fastprefix: another thread has a block open on this model, which chooses for that thread's forwards: "
                "open the block in the thread that runs the model, one at a time, or give each thread a copy"
            )
        self.take(safe=False)

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """Give the turn back, also after an error."""
        if not torch.compiler.is_compiling():
            self.give_back()

    def take(self, safe: bool) -> None:
        """Wait until no other thread has the turn."""
        me = threading.get_ident()
        with self.changed:
            while self.holder not in (None, me):
                if not self.changed.wait(_PATIENCE) and not self.safe and _outside(self.holder):
                    break  # an interrupt, or its end, kept the other thread from giving it back
            if self.holder != me:
                self.holder, self.depth, self.safe = me, 0, safe
            self.depth += 1

    def give_back(self) -> None:
        """Let the next thread in, once as often as it was taken."""
        with self.changed:
            if self.holder == threading.get_ident():
                self.depth -= 1
                if self.depth <= 0:
                    self.holder = None
                    self.changed.notify()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """No forward of another thread runs inside the block."""
        if torch.compiler.is_compiling():
            yield
            return
        self.take(safe=True)
        try:
            yield
        finally:
            self.give_back()

    @contextmanager
    def block(self) -> Iterator[None]:
        """Choose for this thread's forwards; ValueError where another one does."""
        me = threading.get_ident()
        with self.turn():
            if self.chooser not in (None, me):
                raise fail("model", "one on which another thread has a block open", "one block at a time, or a copy")
            outside, self.chooser = self.chooser, me
        try:
            yield
        finally:
            with self.turn():
                self.chooser = outside


def _outside(thread: int | None) -> bool:
    """Whether a thread is in no module's forward, or is no more."""
    frame = sys._current_frames().get(thread) if thread is not None else None
    while frame is not None:
        if "_call_impl" in frame.f_code.co_name:
            return False
        frame = frame.f_back
    return True
