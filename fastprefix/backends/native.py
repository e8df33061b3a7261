"""The C++ kernels of ``csrc/cpu``: prefix and content in one pass, on processors, forward and backward.

Prefix tiles are shared by all samples and by the heads of a group, blocks above the diagonal are skipped, and the cuts
into tasks follow from the call alone, so that the bits are the same for any number of threads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _extension
from ..types import AttentionArgs, Grads, Needs, lse_dtype

_C, ABSENCE = _extension.load()

# Checks, choice and kernels in one call, for calls of which Python has nothing to see: o, or (o, lse), or None for
# others. None where the extension is absent.
attend: Any = None if _C is None else _C.attend

WIDEST = 256
_VECTORS: str = "" if _C is None else _C.instruction_set()
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def routes(device_type: str) -> tuple[str, ...]:
    """Names of the ways in which a call can be computed: one on a processor, where the extension was built."""
    return ("fused",) if _C is not None and device_type == "cpu" else ()


def guess(args: AttentionArgs) -> str:
    """The route that is taken where none is asked for."""
    return "fused"


def unsupported(args: AttentionArgs, route: str | None = None) -> list[str]:
    """Why this backend cannot take the call; empty when it can."""
    reasons = []
    if _C is None:
        reasons.append(ABSENCE)
    if args.q.device.type != "cpu":
        reasons.append(f"device {args.q.device.type}: its kernels are for the cpu")
    if args.q.dtype not in _DTYPES:
        reasons.append(f"dtype {args.q.dtype}: its kernels compute in fp32")
    if max(args.q.shape[3], args.v.shape[3]) > WIDEST:
        reasons.append(f"head dim: its kernels take up to {WIDEST}")
    if args.dropout_p > 0.0:
        reasons.append("dropout_p: its kernels do not drop")
    if args.bias_grad:
        reasons.append("bias: its kernels return no gradient for it")
    return reasons


def _inputs(args: AttentionArgs) -> tuple[Any, ...]:
    """The arguments in the order of ``csrc/ops/inputs.h``."""
    return (
        args.q,
        args.k,
        args.v,
        args.prefix_k,
        args.prefix_v,
        args.causal,
        args.scale,
        args.key_padding_mask,
        args.segment_ids,
        args.q_start,
        args.window,
        args.softcap,
        args.sinks,
        args.bias,
        args.prefix_ids,
        args.prefix_lens,
        args.prefix_bias,
    )


def fwd(args: AttentionArgs, route: str | None = None) -> tuple[Tensor, Tensor]:
    """``o [B, H, S, D_v]`` and ``lse [B, H, S]`` of the merged softmax."""
    if args.q.numel() == 0:
        o = args.q.new_empty(*args.q.shape[:3], args.v.shape[3])
        return o, args.q.new_empty(args.q.shape[:3], dtype=lse_dtype(args.q.dtype))
    assert _C is not None
    found: tuple[Tensor, Tensor] = _C.forward(*_inputs(args))
    return found


def bwd(args: AttentionArgs, o: Tensor, lse: Tensor, do: Tensor, needs: Needs, route: str | None = None) -> Grads:
    """The gradients that ``needs`` asks for."""
    inputs = (args.q, args.k, args.v, args.prefix_k, args.prefix_v, args.prefix_bias)
    asked = (*needs[:5], needs.prefix_bias)
    if args.q.numel() == 0:
        found = [torch.zeros_like(x) if need and x is not None else None for x, need in zip(inputs, asked, strict=True)]
    else:
        assert _C is not None
        found = _C.backward(*_inputs(args), o, lse, do, *asked)
    q, k, v, prefix_k, prefix_v, prefix_bias = found
    return Grads(q, k, v, prefix_k, prefix_v, prefix_bias=prefix_bias)


def remember(args: AttentionArgs) -> None:
    """Let ``attend`` take calls like this one for the backend ``auto``, which has chosen this one for it."""
    if _C is not None:
        _C.remember(*_inputs(args))


def forget() -> None:
    """Undo every :func:`remember`."""
    if _C is not None:
        _C.forget()


def preferred(args: AttentionArgs, mode: str) -> bool:
    """Whether it is expected to be the fastest on a processor where nothing was measured.

    In fp32 it was on every shape of ``docs/benchmarks.md`` with AVX-512, and on those tried with AVX2 alone. Its plain
    vectors of 128 bits were not timed against a vendor's kernels: there ``fastprefix verify`` decides.
    """
    return _VECTORS not in ("", "baseline")
