"""The prefix has no batch dimension, so the batch may become rows: ``[B, H, S, D] -> [1, H, B*S, D]``, one prefix."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from fastprefix.types import AttentionArgs

# Below this many query tokens a group's heads are folded into the rows as well, so that decoding reads each prefix
# tile once per key/value head; above it the copy of q that this takes costs more than it saves.
FOLD_GROUP_UP_TO = 16


class PrefixRows(NamedTuple):
    """One prefix and the query rows that read it. ``rows`` None: every row."""

    k: Tensor  # [H_kv, P, D]
    v: Tensor  # [H_kv, P, D_v]
    rows: tuple[Tensor, Tensor] | None  # batch and query indices, [R] each
    number: int | None  # in the bank


def prefixes(args: AttentionArgs) -> Iterator[PrefixRows]:
    prefix_k, prefix_v = args.prefix_k.detach().to(args.q.dtype), args.prefix_v.detach().to(args.q.dtype)
    if args.prefix_ids is None:
        if args.num_prefix_tokens:
            yield PrefixRows(prefix_k, prefix_v, None, None)
        return
    ids = args.prefix_ids if args.prefix_ids.dim() == 2 else args.prefix_ids[:, None].expand(-1, args.q.shape[2])
    lens = None if args.prefix_lens is None else args.prefix_lens.tolist()
    for n in ids.unique().tolist():
        length = args.num_prefix_tokens if lens is None else lens[n]
        if n >= 0 and length > 0:
            batch, row = (ids == n).nonzero(as_tuple=True)
            yield PrefixRows(prefix_k[n, :, :length], prefix_v[n, :, :length], (batch, row), n)


def fold(x: Tensor, prefix: PrefixRows, heads: int) -> Tensor:
    """``[B, H, S, X] -> [1, heads, rows, X]``: the batch (and with ``heads = H_kv`` the group) becomes rows.

    A view when x is stored as [B, S, H, X] and ``heads = H``, which is how models hold their queries.
    """
    rows = x.transpose(1, 2)  # [B, S, H, X]
    rows = rows.flatten(0, 1) if prefix.rows is None else rows[prefix.rows]  # [R, H, X]
    groups = rows.shape[1] // heads
    if groups > 1:
        rows = rows.unflatten(1, (heads, groups)).transpose(1, 2).flatten(0, 1)  # [R * G, H_kv, X]
    return rows.transpose(0, 1).unsqueeze(0)


def unfold(x: Tensor, like: Tensor, prefix: PrefixRows, fill: float) -> Tensor:
    """The inverse of :func:`fold`, ``[1, heads, rows, ...] -> [B, H, S, ...]``; other prefixes' rows get ``fill``."""
    batch, num_heads, seq = like.shape[:3]
    rows = x.squeeze(0).transpose(0, 1)  # [rows, heads, ...]
    if rows.shape[1] != num_heads:
        groups = num_heads // rows.shape[1]
        rows = rows.unflatten(0, (-1, groups)).transpose(1, 2).flatten(1, 2)  # [R, H, ...]
    if prefix.rows is None:
        return rows.unflatten(0, (batch, seq)).transpose(1, 2)
    full = rows.new_full((batch, seq, *rows.shape[1:]), fill)
    full[prefix.rows] = rows
    return full.transpose(1, 2)


def fold_heads(args: AttentionArgs) -> int:
    decode = args.q.shape[2] <= FOLD_GROUP_UP_TO and args.q.shape[0] > 1
    return args.prefix_k.shape[-3] if decode else args.q.shape[1]
