"""How content is cut so that a vendor kernel takes it without a dense mask wherever that can be.

Under a causal mask with a cache, the past (no mask) and the present (square causal) are two parts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastprefix.backends import vendor
from fastprefix.masks import additive_bias, visible_keys
from fastprefix.types import AttentionArgs


class Part(NamedTuple):
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


def spill(args: AttentionArgs) -> bool:
    """Whether some query position lies before the first or behind the last key."""
    start = int_start(args)
    return start is None or start < 0 or start + args.q.shape[2] > args.k.shape[2]


def parts(args: AttentionArgs) -> Iterator[Part]:
    seq, keys = args.q.shape[2], args.k.shape[2]
    if keys == 0:
        return
    dense = args.segment_ids is not None or args.bias is not None or args.window is not None
    # Vendor kernels write -inf above the diagonal before they scale: times 0 or less that is nan or +inf.
    if dense or (args.causal and (spill(args) or args.scale <= 0.0)):
        yield Part(0, keys, False, dense_mask(args))
        return
    padding = None
    if args.key_padding_mask is not None:
        padding = hide(args.key_padding_mask[:, None, None, :], args)  # [B, 1, 1, T]
    if not args.causal:
        yield Part(0, keys, False, padding)
        return
    start = int_start(args)
    assert start is not None
    if seq == 1:
        yield Part(0, start + 1, False, _columns(padding, 0, start + 1))
        return
    if start > 0:
        yield Part(0, start, False, _columns(padding, 0, start))
    yield Part(start, start + seq, True, _columns(padding, start, start + seq))


def _columns(mask: Tensor | None, first: int, last: int) -> Tensor | None:
    return None if mask is None else mask[..., first:last]


def mask_dtype(args: AttentionArgs) -> torch.dtype:
    return torch.float64 if args.q.dtype == torch.float64 else torch.float32


def hide(visible: Tensor, args: AttentionArgs) -> Tensor:
    return torch.zeros(visible.shape, dtype=mask_dtype(args), device=visible.device).masked_fill_(~visible, vendor.MASK)


def dense_mask(args: AttentionArgs) -> Tensor | None:
    visible, bias = visible_keys(args), additive_bias(args)
    if bias is not None:
        bias = bias.detach().to(mask_dtype(args))
        mask = bias if visible is None else torch.where(visible, bias, vendor.MASK)
    elif visible is not None:
        mask = hide(visible, args)
    else:
        return None
    # Vendor kernels broadcast dimensions of size 1 but want the keys spelled out.
    return mask.expand(*mask.shape[:-1], args.k.shape[2]).contiguous()
