"""Vendor attention ops of aten on CUDA: cuDNN's where they apply, else flash attention."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

aten = torch.ops.aten

# Where cuDNN is expected to beat flash attention, and from which version on. An estimate: not run on a GPU.
CUDNN_ON = ((9, 0), (10, 0))
CUDNN_SINCE = 91500
CUDNN_HEAD_DIM = 128


def fwd(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """``o [B, H, S, D]`` and ``lse [B, H, S]``; causal blocks are square, head dims equal."""
    if takes_cudnn(q, k, scale):
        o, lse = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, False, scale=scale)[:2]
        return o, lse.squeeze(-1)
    o, lse = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)[:2]
    return o, lse


def bwd(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """``dq, dk, dv`` of one part, given the merged ``o`` and ``lse``. Either kernel takes what the other left."""
    sizes = (q.shape[2], k.shape[2], 0.0, causal)
    # Without dropout the random state is never read; the ops still want tensors of its shape.
    state = q.new_empty(2, dtype=torch.int64)
    if takes_cudnn(q, k, scale):
        # Older versions want do as o lies, and warn before they copy it.
        do = do if do.stride() == o.stride() else torch.empty_like(o).copy_(do)
        random = (state[0], state[1], None, None, None)  # seed, offset; no bias, no ragged batch
        dq, dk, dv = aten._scaled_dot_product_cudnn_attention_backward(
            do, q, k, v, o, lse.unsqueeze(-1), *random, *sizes, scale=scale
        )
    else:
        dq, dk, dv = aten._scaled_dot_product_flash_attention_backward(
            do, q, k, v, o, lse, None, None, *sizes, state, state[:0], scale=scale
        )
    return dq, dk, dv


def takes_cudnn(q: Tensor, k: Tensor, scale: float) -> bool:
    """Whether cuDNN's kernels apply. Their backward is not deterministic, and they refuse a single key."""
    shape = min(q.shape[2], k.shape[2]) > 1 and q.shape[3] <= CUDNN_HEAD_DIM and q.shape[3] % 8 == 0
    allowed = torch.backends.cuda.cudnn_sdp_enabled() and not torch.are_deterministic_algorithms_enabled()
    return shape and scale > 0.0 and q.element_size() == 2 and allowed and _has_cudnn(q.device)


@functools.cache
def _has_cudnn(device: torch.device) -> bool:
    if device.type != "cuda" or not torch.backends.cudnn.is_available():
        return False
    version = torch.backends.cudnn.version() or 0
    return version >= CUDNN_SINCE and torch.cuda.get_device_capability(device) in CUDNN_ON
