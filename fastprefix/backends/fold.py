"""The prefix has no batch dimension, so the batch may become rows: ``[B, H, S, D] -> [1, H, B*S, D]``, one prefix."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastprefix.types import AttentionArgs

# Below this many query tokens a group's heads are folded into the rows as well, so that decoding reads each prefix
# tile once per key/value head; above it the copy of q that this takes costs more than it saves.
FOLD_GROUP_UP_TO = 16

# Two blocks for each of an H100's or H200's 132 multiprocessors. An estimate: not run on a GPU.
CUDA_BLOCKS = 264


class PrefixRows(NamedTuple):
    """One prefix and the query rows that read it. ``rows`` None: every row."""

    k: Tensor  # [H_kv, P, D]
    v: Tensor  # [H_kv, P, D_v]
    rows: tuple[Tensor, Tensor] | None  # batch and query indices, [R] each
    number: int | None  # in the bank
    heads: int  # that the rows are folded to: H, or H_kv with the group's heads among the rows
    chunks: int  # C, blocks of rows that vendor kernels run side by side

    def keys_values(self) -> tuple[Tensor, Tensor]:
        """The prefix for every chunk, ``[C, H_kv, P, D]`` and ``[C, H_kv, P, D_v]``: views, not copies."""
        return self.k.expand(self.chunks, -1, -1, -1), self.v.expand(self.chunks, -1, -1, -1)


def prefixes(args: AttentionArgs) -> Iterator[PrefixRows]:
    """The call's prefix, or each one of the bank that some row reads, in q's dtype."""
    prefix_k, prefix_v = args.prefix_k.detach().to(args.q.dtype), args.prefix_v.detach().to(args.q.dtype)
    decode = args.q.shape[2] <= FOLD_GROUP_UP_TO and args.q.shape[0] > 1
    heads = args.prefix_k.shape[-3] if decode else args.q.shape[1]
    if args.prefix_ids is None:
        if args.num_prefix_tokens:
            yield PrefixRows(prefix_k, prefix_v, None, None, heads, 1 if decode else _chunks(args))
        return
    ids = args.prefix_ids if args.prefix_ids.dim() == 2 else args.prefix_ids[:, None].expand(-1, args.q.shape[2])
    lens = None if args.prefix_lens is None else args.prefix_lens.tolist()
    for n in ids.unique().tolist():
        length = args.num_prefix_tokens if lens is None else lens[n]
        if n >= 0 and length > 0:
            batch, row = (ids == n).nonzero(as_tuple=True)
            yield PrefixRows(prefix_k[n, :, :length], prefix_v[n, :, :length], (batch, row), n, heads, 1)


def _chunks(args: AttentionArgs) -> int:
    """The fewest chunks of the batch that keep every lane busy: vendor backwards run one (chunk, H_kv) a thread.

    On CUDA they run one (chunk, H, 128 keys) a block, and a short prefix would leave most of the device idle.
    """
    batch = args.q.shape[0]
    if args.q.device.type == "cpu":
        lanes, units = torch.get_num_threads(), args.prefix_k.shape[-3]
    else:
        lanes, units = CUDA_BLOCKS, args.q.shape[1] * -(-args.num_prefix_tokens // 128)
    for chunks in range(1, batch):
        if batch % chunks == 0 and (units * chunks % lanes == 0 or units * chunks >= 4 * lanes):
            return chunks
    return batch


def fold(x: Tensor, prefix: PrefixRows) -> Tensor:
    """``[B, H, S, X] -> [C, heads, rows, X]``: the batch (and with ``heads = H_kv`` the group) becomes rows.

    A view when x is stored as [B, S, H, X] and ``heads = H``, which is how models hold their queries.
    """
    rows = x.transpose(1, 2)  # [B, S, H, X]
    rows = rows.flatten(0, 1) if prefix.rows is None else rows[prefix.rows]  # [R, H, X]
    groups = rows.shape[1] // prefix.heads
    if groups > 1:
        rows = rows.unflatten(1, (prefix.heads, groups)).transpose(1, 2).flatten(0, 1)  # [R * G, H_kv, X]
    return rows.unflatten(0, (prefix.chunks, rows.shape[0] // prefix.chunks)).transpose(1, 2)


def unfold(x: Tensor, like: Tensor, prefix: PrefixRows, fill: float) -> Tensor:
    """The inverse of :func:`fold`, ``[C, heads, rows, ...] -> [B, H, S, ...]``; other prefixes' rows get ``fill``."""
    batch, num_heads, seq = like.shape[:3]
    rows = x.transpose(1, 2).flatten(0, 1)  # [rows, heads, ...]
    if rows.shape[1] != num_heads:
        groups = num_heads // rows.shape[1]
        rows = rows.unflatten(0, (-1, groups)).transpose(1, 2).flatten(1, 2)  # [R, H, ...]
    if prefix.rows is None:
        return rows.unflatten(0, (batch, seq)).transpose(1, 2)
    full = rows.new_full((batch, seq, *rows.shape[1:]), fill)
    full[prefix.rows] = rows
    return full.transpose(1, 2)
