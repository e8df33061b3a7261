"""Tensors with the same numbers in another place, as slices, caches, expanded and transposed tensors have them."""

from __future__ import annotations

import dataclasses
from random import Random

import torch
from torch import Tensor

from fastprefix.types import AttentionArgs


def filler(x: Tensor, *shape: int) -> Tensor:
    """What lies between the numbers and must not be read: nan, a number that is no id, or True."""
    value = float("nan") if x.is_floating_point() else x.dtype == torch.bool or 99
    return torch.full(shape, value, dtype=x.dtype)


def contiguous(x: Tensor, axis: int) -> Tensor:
    return x.contiguous()


def slice_of(x: Tensor, axis: int) -> Tensor:
    around = filler(x, *x.shape[:axis], 2, *x.shape[axis + 1 :])
    return torch.cat([around, x, around], axis).narrow(axis, 2, x.shape[axis])


def every_other(x: Tensor, axis: int) -> Tensor:
    both = torch.stack([x, filler(x, *x.shape)], axis + 1).flatten(axis, axis + 1)
    return both[(slice(None),) * axis + (slice(0, None, 2),)]


def expanded(x: Tensor, axis: int) -> Tensor:
    """The first of an axis for all of it: other numbers."""
    return x.narrow(axis, 0, 1).expand_as(x)


def transposed(x: Tensor, axis: int) -> Tensor:
    return x.transpose(axis, -1).contiguous().transpose(axis, -1)


LAYOUTS = (contiguous, slice_of, every_other, expanded, transposed)
INPUTS = ("q", "k", "v", "prefix_k", "prefix_v", "key_padding_mask", "segment_ids", "q_start", "prefix_ids")


def lay_out(args: AttentionArgs, random: Random) -> AttentionArgs:
    """The call with some of its inputs in another layout."""
    found = {}
    for name in INPUTS:
        x = getattr(args, name)
        if isinstance(x, Tensor) and x.numel() and x.dim() and random.random() < 0.6:
            axes = x.dim() - 1 if x.is_floating_point() else x.dim()  # other strides in a head are copied
            found[name] = random.choice(LAYOUTS)(x, random.randrange(axes))
    return dataclasses.replace(args, **found)
