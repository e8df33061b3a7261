"""Which rows read which prefix of a bank, sorted on the device: nothing is read back."""

from __future__ import annotations

import torch

from fastprefix._triton.views import Order
from fastprefix.types import AttentionArgs


def order(args: AttentionArgs) -> Order:
    """Units (samples for ids ``[B]``, tokens for ``[B, S]``) by ascending id, those without a prefix first; prefix
    ``n`` has ``units[first[n]:first[n + 1]]``. Nones where there is no bank.
    """
    if args.prefix_ids is None:
        return Order(None, None)
    # Stable: the same units in the same order, so the same sums to the last bit.
    ids, units = torch.sort(args.prefix_ids.reshape(-1), stable=True)
    numbers = torch.arange(args.prefix_k.shape[0] + 1, device=ids.device, dtype=ids.dtype)
    return Order(units, torch.searchsorted(ids, numbers))


def unit_is_token(args: AttentionArgs) -> bool:
    """Whether rows of one sample may read different prefixes."""
    return args.prefix_ids is not None and args.prefix_ids.dim() == 2
