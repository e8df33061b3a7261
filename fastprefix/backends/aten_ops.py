"""aten's vendor attention ops as one pair of functions, with ``lse`` as a natural logarithm.

They share no contract between devices: the CPU's flash kernel takes an fp32 mask of any broadcast shape together with
its (top-left) causal flag; CUDA's takes none. Callers ask for square causal blocks only, where every alignment agrees.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import aten_ops_cuda

aten = torch.ops.aten

# Finite, so that a row of only masked keys gives a finite output that its lse tells apart, and never nan.
MASK = torch.finfo(torch.float32).min / 2
EMPTY_LSE = MASK / 2


def fwd(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None, scale: float, cudnn: bool = False
) -> tuple[Tensor, Tensor]:
    """``o [B, H, S, D_v]`` (in [B, S, H, D_v] storage) and ``lse [B, H, S]``, -inf where a row sees no key.

    ``k`` and ``v`` keep their own number of heads (grouped-query attention without repeating them). ``mask`` is
    additive, 4-D, broadcastable to ``[B, H, S, T]``, with ``MASK`` in hidden places. ``cudnn`` is read on CUDA only.
    """
    width = v.shape[-1]
    q, k, v = _same_width(q, k, v)
    if q.device.type != "cpu":
        o, lse = aten_ops_cuda.fwd(q, k, v, causal, scale, cudnn)
        return o[..., :width], lse
    o, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)
    if mask is not None:
        lse = lse.masked_fill(lse < EMPTY_LSE, float("-inf"))
    return o[..., :width], lse


def bwd(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    causal: bool,
    mask: Tensor | None,
    scale: float,
    cudnn: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """``dq, dk, dv`` of one part, given the **merged** ``o`` and ``lse`` (finite: see ``aten.bwd``)."""
    head_dim, width = q.shape[-1], v.shape[-1]
    do, o = _same_width(do, o, width=max(head_dim, width))
    q, k, v = _same_width(q, k, v)
    if q.device.type != "cpu":
        dq, dk, dv = aten_ops_cuda.bwd(do, q, k, v, o, lse, causal, scale, cudnn)
    else:
        dq, dk, dv = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            do, q, k, v, o, lse, 0.0, causal, attn_mask=mask, scale=scale
        )
    return dq[..., :head_dim], dk[..., :head_dim], dv[..., :width]


def _same_width(*tensors: Tensor, width: int | None = None) -> tuple[Tensor, ...]:
    """Pad the head dims with zeros to one width (MLA has D != D_v): zeros change neither scores nor other columns.

    The kernels take any strides but the last dimension's, which they assume to be 1.
    """
    width = width or max(x.shape[-1] for x in tensors)
    padded = (x if x.shape[-1] == width else torch.nn.functional.pad(x, (0, width - x.shape[-1])) for x in tensors)
    return tuple(x if x.stride(-1) == 1 else x.contiguous() for x in padded)
