"""A bank of prefixes for kernels: a packed one is padded for the length of a launch, and rows are sorted by prefix.

Kernels read padded banks. The padded copy is not saved: the backward makes it again and packs its gradients.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..._triton.kernel_structs import Order
from ...machine.device import is_capturing
from ...masks import prefix_owner
from ...types import AttentionArgs

# Up to so many bytes every prefix gets room for all tokens of the bank: an H100 writes that in the 10 to 20 us that it
# takes to read the longest length back, which would also hold up the host and cannot be captured in a graph. Kernels
# stop at a prefix's own end, so that the rest costs no more than memory. An estimate: not run on a GPU.
ROOM_WITHOUT_ASKING = 32 * 1024 * 1024


def to_padded(args: AttentionArgs) -> AttentionArgs:
    """The call with a bank ``[N, H_kv, P_max, D]`` for a packed ``[H_kv, P, D]``; any other as it is."""
    if not args.packed:
        return args
    assert args.prefix_lens is not None
    lens, tokens = args.prefix_lens, args.num_prefix_tokens
    token = torch.arange(_longest(args), device=lens.device)
    # Behind its end a prefix repeats tokens that no row reads.
    place = (_starts(lens)[:, None] + token).clamp_(max=max(tokens - 1, 0))  # [N, P_max]
    prefix_k, prefix_v = (x.detach()[:, place].transpose(0, 1) for x in (args.prefix_k, args.prefix_v))
    bias = None if args.prefix_bias is None else args.prefix_bias.detach()[:, place].transpose(0, 1)
    return replace(args, prefix_k=prefix_k, prefix_v=prefix_v, prefix_bias=bias)


def to_packed(grad: Tensor | None, args: AttentionArgs) -> Tensor | None:
    """``[N, H_kv, P_max, ...]`` as ``[H_kv, P, ...]``, if ``args`` have a packed bank."""
    if grad is None or not args.packed:
        return grad
    assert args.prefix_lens is not None
    lens, tokens = args.prefix_lens, args.num_prefix_tokens
    owner = prefix_owner(lens, tokens)
    token = torch.arange(tokens, device=lens.device) - _starts(lens)[owner]
    return grad[owner, :, token].transpose(0, 1)


def rows_by_prefix(args: AttentionArgs) -> Order:
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


def _starts(lens: Tensor) -> Tensor:
    return lens.cumsum(0) - lens


def _longest(args: AttentionArgs) -> int:
    """P_max: of the longest prefix, or no less than that."""
    lens, tokens = args.prefix_lens, args.num_prefix_tokens
    assert lens is not None
    bytes_a_token = sum(x.shape[0] * x.shape[2] * x.element_size() for x in (args.prefix_k, args.prefix_v))
    match lens.device.type:
        case "cpu":
            return int(lens.max())
        case "cuda" if lens.shape[0] * tokens * bytes_a_token > ROOM_WITHOUT_ASKING:
            return tokens if is_capturing(lens.device) else int(lens.max())
        case _:
            return tokens
