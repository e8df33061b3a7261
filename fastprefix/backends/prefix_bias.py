"""The bias on a prefix's scores in vendor calls: a mask in the forward, and a sum of its own in the backward."""

from __future__ import annotations

import torch
from torch import Tensor

from ..types import MASKED_BIAS, AttentionArgs
from .aten_ops import MASK
from .content_blocks import mask_dtype
from .fold_batch import PrefixRows

# Scores that are recomputed at once for the bias's gradient.
SCORES_AT_ONCE = 2**22


def mask_of(args: AttentionArgs, prefix: PrefixRows) -> Tensor | None:
    """The bias as a vendor kernel's mask ``[C, heads, 1, P]``, with ``MASK`` where it hides; None without one."""
    if args.prefix_bias is None:
        return None
    bias = prefix.group.keys_of(args.prefix_bias.detach().unsqueeze(-1))[..., 0].to(mask_dtype(args))  # [U, H_kv, P]
    bias = torch.where(bias > MASKED_BIAS, bias, MASK)  # a nan hides, too
    bias = bias.repeat_interleave(prefix.heads // bias.shape[1], 1).unsqueeze(2)
    return bias if len(bias) == prefix.chunks else bias.expand(prefix.chunks, -1, -1, -1)


def gradient(
    args: AttentionArgs,
    prefix: PrefixRows,
    inputs: tuple[Tensor, Tensor, Tensor, Tensor],
    mask: Tensor,
    keys: Tensor,
    values: Tensor,
) -> Tensor:
    """The sum of ``dS = A * (do v^T - delta)`` over rows and the heads of a group: ``[U, H_kv, P]``, fp32 or fp64.

    Vendor kernels sum no gradient of their mask, so the scores are computed once more, some rows at a time.

    Args:
        args: the call.
        prefix: one prefix, or several of one length.
        inputs: folded q ``[C, heads, rows, D]``, do and merged o ``[C, heads, rows, D_v]``, lse ``[C, heads, rows]``.
        mask: from :func:`mask_of`.
        keys: ``[C, H_kv, P, D]``.
        values: ``[C, H_kv, P, D_v]``.
    """
    q, do, o, lse = inputs
    found = mask_dtype(args)
    chunks, heads, rows = lse.shape
    kv_heads, tokens = keys.shape[1:3]
    keys, values = (x.to(found).transpose(-1, -2).unsqueeze(2) for x in (keys, values))  # [C, H_kv, 1, D, P]
    mask = mask.unflatten(1, (kv_heads, -1))  # [C, H_kv, G, 1, P]
    total = torch.zeros(chunks, kv_heads, tokens, dtype=found, device=q.device)
    step = max(1, SCORES_AT_ONCE // max(1, chunks * heads * tokens))
    for first in range(0, rows, step):
        # [C, H_kv, G, step, X]
        some_q, some_do, some_o, some_lse = (
            x[:, :, first : first + step].to(found).unflatten(1, (kv_heads, -1)) for x in (q, do, o, lse.unsqueeze(-1))
        )
        weights = torch.exp((some_q @ keys * args.scale + mask - some_lse).clamp_(max=0.0))
        delta = (some_do * some_o).sum(-1, keepdim=True)
        total += (weights * (some_do @ values - delta)).sum((2, 3))
    return total.unflatten(0, (prefix.group.prefixes, -1)).sum(1)
