"""Which rows read which prefix, cut so that vendor calls take both as they lie: views of the bank and of the batch.

A unit is what one id is given for: a sample (ids ``[B]``) or a token (``[B, S]``).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from fastprefix.types import AttentionArgs


class Cell(NamedTuple):
    """``U`` prefixes of one length, each read by as many units as the others: one vendor call."""

    units: slice | Tensor  # ascending by prefix; a slice where they lie side by side, which then is a view
    size: int  # how many units
    first: int  # where the first prefix begins: its number in a padded bank, its first token in a packed one
    step: int  # from there to the next
    prefixes: int  # U
    length: int  # tokens of each

    def chosen(self, x: Tensor) -> Tensor:
        """The rows ``[units, ...]`` of these units: a view where they lie side by side."""
        return x.index_select(0, self.units) if isinstance(self.units, Tensor) else x[self.units]

    def members(self, bank: Tensor) -> Tensor:
        """The prefixes, ``[U, H_kv, length, D]``: a view of what is shaped like the bank or the one prefix."""
        last = self.first + (self.prefixes - 1) * self.step
        if bank.dim() == 4:
            return bank[self.first : last + 1 : self.step, :, : self.length]
        if self.prefixes == 1:
            return bank[None, :, self.first : last + self.length]
        windows = bank[:, self.first : last + self.length].unfold(1, self.length, self.step)  # [H_kv, U, D, length]
        return windows.permute(1, 0, 3, 2)


def cells(args: AttentionArgs) -> Iterator[Cell]:
    """One cell for the call's one prefix; for a bank few that hold what somebody reads, each prefix in one of them."""
    if args.prefix_ids is None:
        if args.num_prefix_tokens:
            batch = args.q.shape[0]
            yield Cell(slice(0, batch), batch, 0, 1, 1, args.num_prefix_tokens)
        return
    ids, order = args.prefix_ids.reshape(-1), None
    lens = _lens(args)
    starts = [0, *accumulate(lens)] if args.packed else range(len(lens))
    numbers, counts = _runs(ids)
    read = [n for n in numbers if n >= 0 and lens[n]]
    # Units of one prefix that lie apart are gathered: one call, one sum of its gradient. Nothing else needs an order.
    if len(set(read)) < len(read):
        ids, order = ids.sort(stable=True)
        numbers, counts = _runs(ids)
    cell: Cell | None = None
    behind = 0  # units that have been passed
    for number, count in zip(numbers, counts, strict=True):
        here, behind = behind, behind + count
        if number < 0 or not lens[number]:
            continue
        longer = None if cell is None else _extended(cell, here, count, starts[number], lens[number])
        if longer is None:
            if cell is not None:
                yield _gathered(cell, order)
            longer = Cell(slice(here, behind), count, starts[number], 1, 1, lens[number])
        cell = longer
    if cell is not None:
        yield _gathered(cell, order)


def _extended(cell: Cell, here: int, count: int, start: int, length: int) -> Cell | None:
    """The cell with one more prefix; None where that would not be a view of evenly spaced equals."""
    assert isinstance(cell.units, slice)
    step = cell.step if cell.prefixes > 1 else start - cell.first
    evenly = step > 0 and start == cell.first + cell.prefixes * step
    if not evenly or length != cell.length or here != cell.units.stop or count * cell.prefixes != cell.size:
        return None
    units, prefixes = slice(cell.units.start, here + count), cell.prefixes + 1
    return cell._replace(units=units, size=cell.size + count, step=step, prefixes=prefixes)


def _gathered(cell: Cell, order: Tensor | None) -> Cell:
    return cell if order is None else cell._replace(units=order[cell.units])


def _runs(ids: Tensor) -> tuple[list[int], list[int]]:
    """Equal neighbours: their ids, and how many there are."""
    numbers, counts = torch.unique_consecutive(ids, return_counts=True)
    return numbers.tolist(), counts.tolist()


def _lens(args: AttentionArgs) -> list[int]:
    """Tokens of each prefix."""
    if args.prefix_lens is None:
        return [args.num_prefix_tokens] * args.num_prefixes
    lens: list[int] = args.prefix_lens.tolist()
    return lens
