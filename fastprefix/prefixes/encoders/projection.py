"""A linear layer of a prefix's own, which tools for the model's layers leave alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Projection(nn.Module):
    """``x W^T + b``, with the parameters and initialisation of ``nn.Linear``, but not a subclass of it.

    Tools that replace every linear layer of a model (LoRA on ``"all-linear"``, quantisation) leave this class alone.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Linear(inputs, outputs).parameters()  # [outputs, inputs], [outputs]

    def forward(self, x: Tensor) -> Tensor:
        """``[..., outputs]``."""
        return nn.functional.linear(x, self.weight, self.bias)

    @torch.no_grad()
    def fit(self, x: Tensor, target: Tensor) -> float:
        """Set weight and bias by least squares, so that ``x [P, inputs]`` gives ``target [P, outputs]``.

        The fit is exact where the rows of ``x`` are linearly independent.

        Returns:
            The remaining error, relative to the target (Frobenius norms).
        """
        x, target = x.double(), target.double()
        mean = target.mean(0)
        # gelsd, for its minimum-norm solution: the smallest singular values of ``x`` may be close to zero.
        solution = torch.linalg.lstsq(x.cpu(), (target - mean).cpu(), driver="gelsd").solution
        self.weight.copy_(solution.T)
        self.bias.copy_(mean)
        left = nn.functional.linear(x, self.weight.double(), self.bias.double()) - target
        return float(left.norm() / target.norm().clamp(min=torch.finfo(torch.float32).tiny))
