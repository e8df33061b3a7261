"""Vendor attention ops of aten on CUDA: cuDNN's or flash attention's."""

from __future__ import annotations

import torch
from torch import Tensor

from ..machine.device import compute_capability

aten = torch.ops.aten

# Where cuDNN is expected to beat flash attention, and from which version on. An estimate: not run on a GPU.
CUDNN_ON = (90, 100)  # compute capabilities
CUDNN_SINCE = 91500
CUDNN_HEAD_DIM = 128


def fwd(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, cudnn: bool = False) -> tuple[Tensor, Tensor]:
    """``o [B, H, S, D]`` and ``lse [B, H, S]``; causal blocks are square, head dims equal.

    ``cudnn``: by cuDNN's kernels where they apply.
    """
    if cudnn and takes_cudnn(q, k, scale):
        o, lse = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, False, scale=scale)[:2]
        return o, lse.squeeze(-1)
    o, lse = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)[:2]
    return o, lse


def bwd(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
    cudnn: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """``dq, dk, dv`` of one part, given the merged ``o`` and ``lse``. Either kernel takes what the other left."""
    sizes = (q.shape[2], k.shape[2], 0.0, causal)
    # Without dropout the random state is never read; the ops still want tensors of its shape.
    state = q.new_empty(2, dtype=torch.int64)
    if cudnn and takes_cudnn(q, k, scale):
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
    """Whether cuDNN's kernels take queries ``[B, H, S, D]`` on keys ``[B, H_kv, T, D]``; no single row or key."""
    return min(q.shape[2], k.shape[2]) > 1 and no_cudnn(q, scale) is None


def no_cudnn(q: Tensor, scale: float) -> str | None:
    """Why cuDNN's kernels cannot take queries ``[B, H, S, D]``, in words; None when they can."""
    if q.element_size() != 2 or q.shape[3] > CUDNN_HEAD_DIM or q.shape[3] % 8:
        return f"takes fp16 and bf16, head dims of multiples of 8 up to {CUDNN_HEAD_DIM}"
    if scale <= 0.0:
        return "takes a positive scale"
    if not torch.backends.cuda.cudnn_sdp_enabled():
        return "torch.backends.cuda.enable_cudnn_sdp(False) was called"
    if torch.are_deterministic_algorithms_enabled():
        return "its backward is not deterministic"
    return None if _has_cudnn() else "not in this build of torch"


def prefers_cudnn(device: torch.device) -> bool:
    """Whether cuDNN's kernels are expected to be the faster ones, where they apply."""
    if device.type != "cuda" or not _has_cudnn():
        return False
    version = torch.backends.cudnn.version() or 0
    return version >= CUDNN_SINCE and compute_capability(device) in CUDNN_ON


def _has_cudnn() -> bool:
    return torch.version.hip is None and torch.backends.cudnn.is_available()  # on AMD the name means MIOpen
