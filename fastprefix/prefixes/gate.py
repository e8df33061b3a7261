"""``Gate``: the trained factors by which the output of a prefix is added to that of the content."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from fastprefix.errors import fail

GateKind = Literal["tanh", "linear", "scalar"]
GATES: tuple[GateKind, ...] = ("tanh", "linear", "scalar")


def check_gate(gate: object) -> None:
    """Raise ValueError unless ``gate`` is a kind of gate."""
    if gate not in GATES:
        raise fail("gate", repr(gate), f"one of {list(GATES)}")


class Gate(nn.Module):
    """One layer's gate, which starts at zero; calling it returns a factor for each query head, ``[H]``.

    ``"tanh"`` is ``tanh(weight)`` of each head, as in LLaMA-Adapter's code; ``"linear"`` is ``weight`` of each head, as
    in its paper (Zhang et al. 2023, equation 6); ``"scalar"`` is one number for all heads, as in PEFT.
    """

    def __init__(self, kind: GateKind, num_heads: int) -> None:
        super().__init__()
        self.kind, self.num_heads = kind, num_heads
        self.weight = nn.Parameter(torch.zeros(1 if kind == "scalar" else num_heads))

    def forward(self) -> Tensor:
        """``[H]``."""
        gate = torch.tanh(self.weight) if self.kind == "tanh" else self.weight
        return gate.expand(self.num_heads)
