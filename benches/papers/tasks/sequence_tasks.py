"""Tasks on short sequences of digits (Petrov et al. 2024, 2310.19698): sort them, add to them, count them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def ascending(x: Tensor) -> Tensor:
    """Each row sorted."""
    return x.sort(-1).values


def descending(x: Tensor) -> Tensor:
    """Each row sorted, the largest first."""
    return x.sort(-1, descending=True).values


def add_one(x: Tensor) -> Tensor:
    """One more than each digit."""
    return x + 1


def add_two(x: Tensor) -> Tensor:
    """Two more than each digit."""
    return x + 2


def ascending_add_one(x: Tensor) -> Tensor:
    """Each row sorted, and one more than each digit: a composition of two of the tasks."""
    return ascending(x) + 1


def double_histogram(x: Tensor) -> Tensor:
    """In place of each digit, how often the row has it: no composition of the other tasks."""
    return (x[:, :, None] == x[:, None, :]).sum(-1)


TASKS = {
    "ascending": ascending,
    "descending": descending,
    "add 1": add_one,
    "add 2": add_two,
    "ascending + 1": ascending_add_one,
    "double histogram": double_histogram,
}
MIX = ("ascending", "descending", "add 1", "add 2")  # what a model is pretrained on, without saying which it is
_CHUNK = 64  # batches that are drawn at a time


@dataclass(frozen=True)
class Sequences:
    """Which inputs there are; tokens are ``0 .. vocabulary - 1``, and outputs may be larger than inputs are."""

    length: int = 6
    digits: int = 5
    vocabulary: int = 7
    distinct: int = 3  # half of the inputs have at most so many different digits, so that digits repeat

    def inputs(self, count: int, generator: torch.Generator, held_out: bool) -> Tensor:
        """``[count, length]``; a hash of the digits keeps a quarter of all inputs for tests."""
        found, rows = torch.empty(0, self.length, dtype=torch.long), 0
        places = self.digits ** torch.arange(self.length)
        while rows < count:
            x = torch.randint(self.digits, (4 * count, self.length), generator=generator)
            code = (x * places).sum(-1)
            tested = ((code * 2654435761) % 2**32 >> 16) % 4 == 0
            x = x[tested == held_out]
            repeated = torch.nn.functional.one_hot(x, self.digits).amax(1).sum(-1) <= self.distinct
            free = torch.rand(len(x), generator=generator) < 0.5
            found = torch.cat([found, x[free | repeated]])
            rows = len(found)
        return found[:count]

    def batches(self, tasks: Sequence[str], steps: int, rows: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """``steps`` batches of inputs and targets, each row of one of the tasks by chance."""
        generator = torch.Generator().manual_seed(seed)
        for first in range(0, steps, _CHUNK):
            n = min(_CHUNK, steps - first) * rows
            x = self.inputs(n, generator, held_out=False)
            of = torch.randint(len(tasks), (n, 1), generator=generator)
            y = torch.stack([TASKS[task](x) for task in tasks]).gather(0, of.expand_as(x)[None])[0]
            yield from zip(x.split(rows), y.split(rows), strict=True)

    def tests(self, task: str, count: int) -> tuple[Tensor, Tensor]:
        """``count`` inputs that are never trained on, the same for all, and a task's outputs."""
        x = self.inputs(count, torch.Generator().manual_seed(2024), held_out=True)
        return x, TASKS[task](x)


SMALL, FULL = Sequences(), Sequences(length=10, digits=8, vocabulary=10, distinct=5)
