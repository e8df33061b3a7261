"""Which rows read which prefix, cut so that vendor calls take both as they lie: views of the bank and of the batch.

A unit is what one id is given for: a sample (ids ``[B]``) or a token (``[B, S]``).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from ..types import AttentionArgs


class PrefixGroup(NamedTuple):
    """``U`` prefixes of one length, each read by as many units as the others: one vendor call."""

    units: slice | Tensor  # ascending by prefix; a slice where they lie side by side, which then is a view
    size: int  # how many units
    first: int  # where the first prefix begins: its number in a padded bank, its first token in a packed one
    step: int  # from there to the next
    prefixes: int  # U
    length: int  # tokens of each

    def rows_of(self, x: Tensor) -> Tensor:
        """The rows ``[units, ...]`` of these units: a view where they lie side by side."""
        return x.index_select(0, self.units) if isinstance(self.units, Tensor) else x[self.units]

    def keys_of(self, bank: Tensor) -> Tensor:
        """The prefixes' keys, ``[U, H_kv, length, D]``: a view of ``bank``, the call's bank or its one prefix."""
        last = self.first + (self.prefixes - 1) * self.step
        if bank.dim() == 4:
            return bank[self.first : last + 1 : self.step, :, : self.length]
        if self.prefixes == 1:
            return bank[None, :, self.first : last + self.length]
        windows = bank[:, self.first : last + self.length].unfold(1, self.length, self.step)  # [H_kv, U, D, length]
        return windows.permute(1, 0, 3, 2)


def prefix_groups(args: AttentionArgs) -> Iterator[PrefixGroup]:
    """One group for a call's one prefix; for a bank few groups, with each prefix that some row reads in one of them."""
    if args.prefix_ids is None:
        if args.num_prefix_tokens:
            batch = args.q.shape[0]
            yield PrefixGroup(slice(0, batch), batch, 0, 1, 1, args.num_prefix_tokens)
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
    group: PrefixGroup | None = None
    end = 0  # of the units that have been passed
    for number, count in zip(numbers, counts, strict=True):
        begin, end = end, end + count
        if number < 0 or not lens[number]:
            continue
        longer = None if group is None else _extended(group, begin, count, starts[number], lens[number])
        if longer is None:
            if group is not None:
                yield _gathered(group, order)
            longer = PrefixGroup(slice(begin, end), count, starts[number], 1, 1, lens[number])
        group = longer
    if group is not None:
        yield _gathered(group, order)


def _extended(group: PrefixGroup, begin: int, count: int, start: int, length: int) -> PrefixGroup | None:
    """The group with one more prefix; None where that would not be a view of evenly spaced equals."""
    assert isinstance(group.units, slice)
    step = group.step if group.prefixes > 1 else start - group.first
    evenly = step > 0 and start == group.first + group.prefixes * step
    if not evenly or length != group.length or begin != group.units.stop or count * group.prefixes != group.size:
        return None
    units, prefixes = slice(group.units.start, begin + count), group.prefixes + 1
    return group._replace(units=units, size=group.size + count, step=step, prefixes=prefixes)


def _gathered(group: PrefixGroup, order: Tensor | None) -> PrefixGroup:
    return group if order is None else group._replace(units=order[group.units])


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
