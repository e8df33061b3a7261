"""One vendor call over ``[prefix ; content]``, where on a CPU a second call costs more than a copy of K and V.

The concatenation lives for the call only. The backward makes it again, so that only q, k, v, o and lse are saved.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..types import AttentionArgs
from . import aten_ops
from .content_blocks import dense_mask, hides_nothing

# Forward + backward on two cores, fp32, B8 H9/3 D64 P16: one call takes 0.85 of the time of two at S64, 0.96 at S256,
# 1.3 at S1024 (above 512 keys the vendor skips causal blocks, which a mask prevents).
ROWS = (17, 512)

# In decoding the copy is the cost. Over 72 shapes on two cores, B1 to B16, H9/3 D64 and H32/8 D128, one call takes 0.5
# to 0.9 of the time of two up to 2 MiB, as long at 3, and more above.
MOST_COPIED = 3 * 2**19


def possible(args: AttentionArgs) -> bool:
    """Whether there is one prefix, without a bias, and content, to be concatenated on a CPU."""
    one = args.prefix_ids is None and args.prefix_bias is None
    return args.q.device.type == "cpu" and one and 0 not in (args.num_prefix_tokens, args.k.shape[2])


def preferred(args: AttentionArgs) -> bool:
    """Whether one call beats two."""
    rows, keys = args.q.shape[2], args.k.shape[2]
    if rows == 1:
        width = (args.q.shape[3] + args.v.shape[3]) * args.q.element_size()
        copied = args.k.shape[0] * args.k.shape[1] * (args.num_prefix_tokens + keys) * width
        return copied <= MOST_COPIED and hides_nothing(args) and possible(args)
    small = ROWS[0] <= rows <= ROWS[1] and keys <= ROWS[1] and 4 * args.num_prefix_tokens <= max(64, keys)
    return small and possible(args)


def _inputs(args: AttentionArgs) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys and values ``[B, H_kv, P + T, D]`` and the mask over both, None when every row sees everything."""
    batch = args.q.shape[0]
    keys, values = (
        torch.cat([shared.detach().to(own.dtype).expand(batch, -1, -1, -1), own], 2)
        for shared, own in ((args.prefix_k, args.k), (args.prefix_v, args.v))
    )
    mask = dense_mask(args)
    return keys, values, None if mask is None else torch.nn.functional.pad(mask, (args.num_prefix_tokens, 0))


def fwd(args: AttentionArgs) -> tuple[Tensor, Tensor]:
    """``o [B, H, S, D_v]`` and ``lse [B, H, S]``, without sinks."""
    keys, values, mask = _inputs(args)
    return aten_ops.fwd(args.q, keys, values, False, mask, args.scale)


def bwd(args: AttentionArgs, o: Tensor, lse: Tensor, do: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, dprefix_k and dprefix_v."""
    prefix = args.num_prefix_tokens
    keys, values, mask = _inputs(args)
    dq, dk, dv = aten_ops.bwd(do, args.q, keys, values, o, lse, False, mask, args.scale)
    dprefix_k, dprefix_v = (grad[:, :, :prefix].sum(0, dtype=lse.dtype).to(args.prefix_k.dtype) for grad in (dk, dv))
    return dq, dk[:, :, prefix:], dv[:, :, prefix:], dprefix_k, dprefix_v
