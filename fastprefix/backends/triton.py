"""Kernels of our own in Triton: prefix and content in one pass, forward and backward (FlashAttention-2, Dao 2023).

Triton is imported by the first call, never by ``import fastprefix``.
"""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor

from ..machine.device import GPUS
from ..types import AttentionArgs, Grads, Needs

LARGEST_HEAD_DIM = 256
# Three tf32 products for one keep so much in registers that larger heads spill.
LARGEST_FP32_HEAD_DIM = 64


# One launch, or the keys split over programs whose partial softmaxes a second launch merges.
ROUTES = ("fused", "split")
DECODE_ROUTES = ("split",)  # those that only decode


def routes(device_type: str) -> tuple[str, ...]:
    """Names of the ways in which the kernels can compute a call."""
    return ROUTES


def guess(args: AttentionArgs) -> str:
    """The route that is taken where none is asked for."""
    from .launch import split_kv_decode

    return "split" if split_kv_decode.preferred(args) else "fused"


def unsupported(args: AttentionArgs, route: str | None = None) -> list[str]:
    """Why this backend, or one route of it, cannot take the call; empty when it can."""
    if not _installed():
        return ["triton is not installed"]
    from .launch import launcher, split_kv_decode

    reasons = []
    device = args.q.device
    if device.type in GPUS:
        if launcher.device(args.q)[0] < 80:
            reasons.append(f"device: compute capability {launcher.device(args.q)[0] / 10}, the kernels need 8.0")
    elif device.type == "cpu" and not launcher.INTERPRETER:
        reasons.append("device cpu: Triton runs on GPUs (TRITON_INTERPRET=1, set before it is imported, interprets)")
    elif device.type != "cpu" and not launcher.is_dry_run():
        reasons.append(f"device {device.type}: Triton runs on GPUs")
    if args.q.dtype == torch.float64:
        reasons.append("dtype torch.float64: tensor cores accumulate in fp32")
    if args.q.dtype == torch.bfloat16 and launcher.INTERPRETER:
        reasons.append("dtype torch.bfloat16: Triton's interpreter computes its products wrongly")
    widest, fp32 = max(args.q.shape[3], args.v.shape[3]), args.q.dtype == torch.float32 and device.type != "cpu"
    largest = LARGEST_FP32_HEAD_DIM if fp32 else LARGEST_HEAD_DIM
    if widest > largest:
        reasons.append(f"head dim {widest}: at most {largest}" + (" in fp32" if fp32 else ""))
    if args.dropout_p > 0.0:
        reasons.append("dropout_p: not in the kernels")
    if args.bias_grad:
        reasons.append("bias: its gradient is not in the kernels")
    if route == "split" and args.q.shape[2] > split_kv_decode.LARGEST_SEQ:
        reasons.append(f"split: takes at most {split_kv_decode.LARGEST_SEQ} query tokens")
    return reasons


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def fwd(args: AttentionArgs, route: str | None = None) -> tuple[Tensor, Tensor]:
    """``o [B, H, S, D_v]`` and ``lse [B, H, S]`` of the merged softmax; without a route, by one that is guessed."""
    from .launch import forward, prefix_bank

    return forward.fwd(prefix_bank.to_padded(args), route=route)


def fwd_with_mass(args: AttentionArgs) -> tuple[Tensor, Tensor, Tensor]:
    """``o``, ``lse`` and the share ``[B, H, S]`` of each row's attention that falls on the prefix, in the same pass.

    ``m = exp(lse_prefix - lse)``: a prefix adds ``m * o_prefix`` and scales the rest by ``1 - m`` (Petrov et al. 2024).
    """
    from .launch import forward, prefix_bank

    prefix_lse = args.q.new_empty(args.q.shape[:3], dtype=torch.float32)
    o, lse = forward.fwd(prefix_bank.to_padded(args), prefix_lse)
    return o, lse, torch.exp(prefix_lse - lse.masked_fill(lse == float("-inf"), 0.0))


def bwd(args: AttentionArgs, o: Tensor, lse: Tensor, do: Tensor, needs: Needs, route: str | None = None) -> Grads:
    """Gradients of :func:`fwd`; a part that nothing needs is not launched."""
    from .launch import backward, prefix_bank

    grads = backward.fused(prefix_bank.to_padded(args), o, lse, do, needs)
    prefix_k, prefix_v, bias = (
        prefix_bank.to_packed(grad, args) for grad in (grads.prefix_k, grads.prefix_v, grads.prefix_bias)
    )
    return grads._replace(prefix_k=prefix_k, prefix_v=prefix_v, prefix_bias=bias)
