"""The prefix has no batch dimension, so the batch may become rows: ``[B, H, S, D] -> [1, H, B*S, D]``, one prefix."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..types import AttentionArgs
from .bank_views import PrefixGroup, prefix_groups

# Two blocks for each of an H100's or H200's 132 multiprocessors. An estimate: not run on a GPU.
CUDA_BLOCKS = 264

# Query rows that a CPU's vendor kernel takes at once: shorter chunks would fill no step of it.
CPU_ROWS = 32


class PrefixRows(NamedTuple):
    """One prefix, or several of one length, and the query rows that read them."""

    group: PrefixGroup
    whole: bool  # every row reads the one prefix
    by_token: bool  # units are tokens
    heads: int  # that the rows are folded to: H, or H_kv with the group's heads among the rows
    chunks: int  # C, blocks of rows that vendor kernels run side by side: one a prefix, or several of the one prefix

    def keys_values(self, args: AttentionArgs) -> tuple[Tensor, Tensor]:
        """Keys ``[C, H_kv, P, D]`` and values ``[C, H_kv, P, D_v]`` of the chunks: views where the dtype is q's."""
        found = (self.group.keys_of(x.detach()).to(args.q.dtype) for x in (args.prefix_k, args.prefix_v))
        k, v = (x if len(x) == self.chunks else x.expand(self.chunks, -1, -1, -1) for x in found)
        return k, v


def prefix_rows(args: AttentionArgs, packed: bool) -> Iterator[PrefixRows]:
    """The call's prefix, or those of the bank that some row reads; ``packed``: the heads of a group become rows too."""
    heads = args.k.shape[1] if packed else args.q.shape[1]
    by_token = args.prefix_ids is not None and args.prefix_ids.dim() == 2
    for group in prefix_groups(args):
        if group.prefixes > 1:
            chunks = group.prefixes
        else:
            chunks = 1 if packed else _chunks(args, group, by_token)
        yield PrefixRows(group, args.prefix_ids is None, by_token, heads, chunks)


def _chunks(args: AttentionArgs, group: PrefixGroup, by_token: bool) -> int:
    """The fewest chunks of a prefix's rows that keep every lane busy: vendor backwards run one (chunk, H_kv) a thread.

    On CUDA they run one (chunk, H, 128 keys) a block, and a short prefix would leave most of the device idle.
    """
    rows = group.size * (1 if by_token else args.q.shape[2])
    if args.q.device.type == "cpu":
        lanes, units, most = torch.get_num_threads(), args.k.shape[1], max(1, rows // CPU_ROWS)
    else:
        lanes, units, most = CUDA_BLOCKS, args.q.shape[1] * -(-group.length // 128), args.q.shape[0]
    chunks = 1
    for chunks in (n for n in range(1, most + 1) if rows % n == 0):
        if units * chunks % lanes == 0 or units * chunks >= 4 * lanes:
            break
    return chunks


def unit_rows(x: Tensor, by_token: bool) -> Tensor:
    """``[B, H, S, X] -> [B, S, H, X]``, or ``[B*S, 1, H, X]``: a view when x is stored as [B, S, H, X]."""
    rows = x.transpose(1, 2)
    return rows.flatten(0, 1).unsqueeze(1) if by_token else rows


def fold(x: Tensor, prefix: PrefixRows) -> Tensor:
    """``[B, H, S, X] -> [C, heads, rows, X]``: the batch (and with ``heads = H_kv`` the group) becomes rows.

    A view when x is stored as [B, S, H, X], which is how models hold their queries, ``heads = H`` and the units that
    read the prefix lie side by side.
    """
    rows = prefix.group.rows_of(unit_rows(x, prefix.by_token)).flatten(0, 1)  # [R, H, X]
    groups = rows.shape[1] // prefix.heads
    if groups > 1:  # [R * G, H_kv, X]
        rows = rows.unflatten(1, (prefix.heads, groups)).transpose(1, 2).flatten(0, 1)
    return rows.unflatten(0, (prefix.chunks, rows.shape[0] // prefix.chunks)).transpose(1, 2)


def unfold(x: Tensor, num_heads: int, prefix: PrefixRows) -> Tensor:
    """The inverse of :func:`fold` on the units that read the prefix: ``[C, heads, rows, X] -> [units, rows, H, X]``."""
    rows = x.transpose(1, 2).flatten(0, 1)  # [R (* G), heads, X]
    if prefix.heads != num_heads:  # [R, H, X]
        rows = rows.unflatten(0, (-1, num_heads // prefix.heads)).transpose(1, 2).flatten(1, 2)
    return rows.unflatten(0, (prefix.group.size, -1))
