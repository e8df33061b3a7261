"""Content keys as blocks that vendor kernels take, without a dense mask wherever that is possible.

Under a causal mask with a cache, the past (no mask) and the present (square causal) are two blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..masks import additive_bias, visible_keys
from ..types import AttentionArgs
from . import aten_ops


class ContentBlock(NamedTuple):
    """One vendor call on content: keys ``first`` to ``last``."""

    first: int
    last: int
    causal: bool
    mask: Tensor | None


def int_start(args: AttentionArgs) -> int | None:
    """q_start as a number; None when it differs between samples or would have to be read from a device."""
    start = args.q_start
    if start is None:
        return args.k.shape[2] - args.q.shape[2]
    if isinstance(start, int):
        return start
    if start.device.type != "cpu" or start.numel() == 0:
        return None
    values = start.reshape(-1)
    return int(values[0]) if bool((values == values[0]).all()) else None


def has_rows_outside_keys(args: AttentionArgs) -> bool:
    """Whether some query position lies before the first or after the last key."""
    start = int_start(args)
    return start is None or start < 0 or start + args.q.shape[2] > args.k.shape[2]


def hides_nothing(args: AttentionArgs) -> bool:
    """Whether it is plain that every row sees every key: no mask, and none of causality's, as in a step of decoding."""
    if args.key_padding_mask is not None or args.segment_ids is not None or args.bias is not None:
        return False
    if not args.causal:
        return True
    keys = args.k.shape[2]
    return args.q.shape[2] == 1 and int_start(args) == keys - 1 and (args.window is None or args.window >= keys)


def content_blocks(args: AttentionArgs) -> Iterator[ContentBlock]:
    """The vendor calls that together cover every key some row sees."""
    seq, keys = args.q.shape[2], args.k.shape[2]
    if keys == 0:
        return
    dense = args.segment_ids is not None or args.bias is not None or args.window is not None
    # Vendor kernels write -inf above the diagonal before they scale: times 0 or less that is nan or +inf.
    if dense or (args.causal and (has_rows_outside_keys(args) or args.scale <= 0.0)):
        yield ContentBlock(0, keys, False, dense_mask(args))
        return
    padding = None
    if args.key_padding_mask is not None:
        padding = to_additive_mask(args.key_padding_mask[:, None, None, :], args)  # [B, 1, 1, T]
    if not args.causal:
        yield ContentBlock(0, keys, False, padding)
        return
    start = int_start(args)
    assert start is not None
    if seq == 1:
        yield ContentBlock(0, start + 1, False, _columns(padding, 0, start + 1))
        return
    if start > 0:
        yield ContentBlock(0, start, False, _columns(padding, 0, start))
    yield ContentBlock(start, start + seq, True, _columns(padding, start, start + seq))


def _columns(mask: Tensor | None, first: int, last: int) -> Tensor | None:
    return None if mask is None else mask[..., first:last]


def mask_dtype(args: AttentionArgs) -> torch.dtype:
    """What vendor kernels take an additive mask in: fp32, fp64 for fp64."""
    return torch.float64 if args.q.dtype == torch.float64 else torch.float32


def to_additive_mask(visible: Tensor, args: AttentionArgs) -> Tensor:
    """A bool mask as one that is added to scores: 0 where visible, ``MASK`` where not."""
    mask = torch.zeros(visible.shape, dtype=mask_dtype(args), device=visible.device)
    return mask.masked_fill_(~visible, aten_ops.MASK)


def dense_mask(args: AttentionArgs) -> Tensor | None:
    """Every mask and the bias as one additive mask ``[B or 1, H or 1, S or 1, T]``; None when nothing hides a key."""
    if hides_nothing(args):
        return None
    visible, bias = visible_keys(args), additive_bias(args)
    if bias is not None:
        bias = bias.detach().to(mask_dtype(args))
        mask = bias if visible is None else torch.where(visible, bias, aten_ops.MASK)
    elif visible is not None:
        mask = to_additive_mask(visible, args)
    else:
        return None
    # Vendor kernels broadcast dimensions of size 1 but want the keys spelled out.
    return mask.expand(*mask.shape[:-1], args.k.shape[2]).contiguous()
