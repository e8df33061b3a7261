"""Linear regression in context: tasks, one step of gradient descent, and one layer of linear or of softmax attention.

A task is a vector w. The context has N pairs (x, y = w . x), and the question is a further x; each is one token
(von Oswald et al. 2023, arXiv:2212.07677). Errors are means of squares.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fastprefix import prefix_attention

DIM, PAIRS = 10, 10
TASKS = 256  # of a step
Prefix = tuple[Tensor, Tensor]
Predict = Callable[[Tensor, Tensor], Tensor]  # of x [B, N + 1, DIM] and y [B, N], the last x's y: [B]


def draw_tasks(count: int, generator: torch.Generator, mean: Tensor | float = 0.0) -> tuple[Tensor, Tensor]:
    """``x`` ``[count, PAIRS + 1, DIM]`` in -1 to 1, and ``y`` ``[count, PAIRS + 1]`` of tasks from N(mean, I)."""
    w = torch.randn(count, DIM, generator=generator) + mean
    x = torch.rand(count, PAIRS + 1, DIM, generator=generator) * 2 - 1
    return x, (x * w[:, None]).sum(-1)


def descent(x: Tensor, y: Tensor, rate: float, start: Tensor) -> Tensor:
    """What linear regression predicts ``[B]`` after one step of gradient descent from ``start`` ``[DIM]``."""
    residual = y - x[:, :-1] @ start
    step = (residual[..., None] * x[:, :-1]).mean(1)
    return x[:, -1] @ start + rate * (step * x[:, -1]).sum(1)


def best_rate(generator: torch.Generator, start: Tensor) -> float:
    """The rate of :func:`descent` with the least error over tasks that are drawn around ``start``."""
    x, y = draw_tasks(100_000, generator, start)
    known = x[:, -1] @ start
    step = descent(x, y[:, :-1], 1.0, start) - known
    return (step @ (y[:, -1] - known) / step.square().sum()).item()


class LinearAttention(nn.Module):
    """One head without a softmax: ``sum_i (k_i . q) v_i / N``, to which P further pairs of k and v may be added."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Parameter(_normal(0.1, (DIM + 1, n), generator)) for n in (DIM + 1, DIM + 1, 1))

    def forward(self, x: Tensor, y: Tensor, prefix: Prefix | None = None) -> Tensor:
        context, question = _tokens(x, y)
        q, k, v = question @ self.q, context @ self.k, context @ self.v
        out = ((k @ q[:, 0, :, None]) * v).mean(1)[:, 0]
        return out if prefix is None else out + (q[:, 0] @ prefix[0].T) @ prefix[1]

    def new_prefix(self, tokens: int, generator: torch.Generator) -> Prefix:
        """Keys ``[P, DIM + 1]`` and values ``[P]``."""
        return _normal(0.1, (tokens, DIM + 1), generator), _normal(0.1, (tokens,), generator)


class SoftmaxAttention(nn.Module):
    """Two heads with a softmax, in which a prefix takes part by :func:`fastprefix.prefix_attention`."""

    heads, dim = 2, 16

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        width = self.heads * self.dim
        self.q, self.k, self.v = (nn.Parameter(_normal(0.3, (DIM + 1, width), generator)) for _ in range(3))
        self.out = nn.Parameter(_normal(0.3, (width,), generator))

    def forward(self, x: Tensor, y: Tensor, prefix: Prefix | None = None) -> Tensor:
        context, question = _tokens(x, y)
        q, k, v = self._split(question @ self.q), self._split(context @ self.k), self._split(context @ self.v)
        prefix_k, prefix_v = prefix or (q.new_zeros(self.heads, 0, self.dim),) * 2
        found = prefix_attention(q, k, v, prefix_k, prefix_v, causal=False)
        return found.transpose(1, 2).flatten(1) @ self.out

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, self.dim)).transpose(1, 2)

    def new_prefix(self, tokens: int, generator: torch.Generator) -> Prefix:
        """Keys and values ``[heads, P, dim]``."""
        shape = (self.heads, tokens, self.dim)
        return _normal(1.0, shape, generator), _normal(1.0, shape, generator)


def _normal(std: float, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return std * torch.randn(shape, generator=generator)


def _tokens(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The context ``[B, N, DIM + 1]``, and the question ``[B, 1, DIM + 1]`` with 0 in place of its y."""
    return torch.cat([x[:, :-1], y[..., None]], -1), nn.functional.pad(x[:, -1:], (0, 1))


def fit(
    predict: Predict, trained: Sequence[Tensor], steps: int, rate: float, generator: torch.Generator, mean: Tensor
) -> None:
    """Train with Adam on new tasks in every step, the rate falling along a cosine."""
    optimizer = torch.optim.Adam(trained, lr=rate, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        x, y = draw_tasks(TASKS, generator, mean)
        optimizer.zero_grad()
        (predict(x, y[:, :-1]) - y[:, -1]).square().mean().backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()


@torch.no_grad()
def error(predict: Predict, mean: Tensor | float = 0.0) -> float:
    """The mean squared error over 50,000 tasks, which are the same in every call."""
    x, y = draw_tasks(50_000, torch.Generator().manual_seed(99), mean)
    return (predict(x, y[:, :-1]) - y[:, -1]).square().mean().item()
