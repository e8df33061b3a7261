"""What ``auto`` adds to a call: the lookup of what was proved, beside the question that every call asks its backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fastprefix import dispatch
from fastprefix.types import AttentionArgs


def _args() -> AttentionArgs:
    q, k, prefix = torch.randn(1, 9, 1, 64), torch.randn(1, 3, 64, 64), torch.randn(3, 16, 64)
    return AttentionArgs(q, k, k, prefix, prefix, scale=0.125)


def test_auto(time_it: Callable[[str, Callable[[], Any]], None]) -> None:
    args = _args()
    time_it("the choice of a backend", lambda: dispatch.choose(args, "auto"))


def test_by_name(time_it: Callable[[str, Callable[[], Any]], None]) -> None:
    args = _args()
    time_it("the choice of a backend", lambda: dispatch.choose(args, "aten"))
