"""Dense masks of the keys that each query row sees, for the reference and for vendor kernels that need a mask."""

from __future__ import annotations

import torch
from torch import Tensor

from .types import MASKED_BIAS, AttentionArgs


def query_positions(args: AttentionArgs) -> Tensor:
    """Content position of every query row, ``[B or 1, S]`` int64."""
    seq, keys = args.q.shape[2], args.k.shape[2]
    rows = torch.arange(seq, device=args.q.device)
    start = keys - seq if args.q_start is None else args.q_start
    if isinstance(start, Tensor):
        return start.reshape(-1, 1).to(rows.dtype) + rows
    return (start + rows).unsqueeze(0)


def visible_keys(args: AttentionArgs) -> Tensor | None:
    """``[B or 1, H or 1, S or 1, T]`` bool, True where the row sees the key; None when every row sees every key."""
    keys = args.k.shape[2]
    column = torch.arange(keys, device=args.q.device)  # [T]
    position = query_positions(args)[:, None, :, None]  # [B or 1, 1, S, 1]
    visible: list[Tensor] = []
    if args.causal:
        visible.append(column <= position)
    if args.window is not None:
        visible.append(column > position - args.window)
    if args.key_padding_mask is not None:
        visible.append(args.key_padding_mask[:, None, None, :])
    if args.segment_ids is not None and keys:
        segments = args.segment_ids  # [B, T]
        index = position[:, 0, :, 0].clamp(0, keys - 1).expand(segments.shape[0], -1)
        visible.append(segments.gather(1, index)[:, None, :, None] == segments[:, None, None, :])
    if args.bias is not None:
        bias = args.bias[(None,) * (4 - args.bias.dim())]
        visible.append(bias if bias.dtype == torch.bool else bias > MASKED_BIAS)
    if not visible:
        return None
    mask = visible[0]
    for other in visible[1:]:
        mask = mask & other
    return mask


def prefix_owner(lens: Tensor, tokens: int) -> Tensor:
    """Index ``[P]`` of the prefix that owns each token of a packed bank; N after the last prefix. No host sync."""
    # The first prefix that ends after the token; a prefix of length 0 ends where it begins and owns no token.
    return torch.searchsorted(lens.cumsum(0), torch.arange(tokens, device=lens.device), right=True)


def additive_bias(args: AttentionArgs) -> Tensor | None:
    """The float bias, four-dimensional and finite; None without a bias or for a bool bias, which only hides keys."""
    if args.bias is None or args.bias.dtype == torch.bool:
        return None
    return finite_bias(args.bias[(None,) * (4 - args.bias.dim())])


def finite_bias(bias: Tensor) -> Tensor:
    """A float bias with 0 where it hides a key, and in place of nan, which hides one too."""
    return bias.masked_fill(~(bias > MASKED_BIAS), 0.0)
