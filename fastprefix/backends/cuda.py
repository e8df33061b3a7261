"""CUDA kernels of our own: decoding, which is few query tokens and many keys, and any forward and backward.

``split_kv`` lets each sample read its prefix and then its content, cut into parts that run side by side and are merged
(Flash-Decoding, Dao et al. 2023); ``cascade`` reads a tile of the prefix once for the rows of all samples (Juravsky et
al. 2024). ``fused`` reads prefix and content in one loop: on Hopper a warp-specialised one (after FlashAttention-3,
Shah et al. 2024), elsewhere one of FlashAttention-2's kind (Dao 2023). All multiply the heads of a group together. The
library with the kernels is found by ``cuda_library``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..cuda_library import library
from ..cuda_library.library import Library
from ..errors import UnsupportedError
from ..machine import device as machine
from ..types import AttentionArgs, Grads, Needs

DECODE_ROUTES = ("split_kv", "cascade")  # those that only decode
ROUTES = (*DECODE_ROUTES, "fused")

LARGEST_SEQ = 16
LARGEST_HEAD_DIM, LARGEST_FUSED_HEAD_DIM = 256, 128
LARGEST_INT = 2**31 - 1
LEAST_CAPABILITY = 80
# Kernels copy 16 bytes at a time, which are 8 elements.
ALIGNMENT, STEP = 16, 8
_DTYPES = (torch.bfloat16, torch.float16)
_AUTO = 0  # of decoding's routes, of which the others are numbered from 1


class _Emulated(NamedTuple):
    """A library whose kernels run elsewhere than on CUDA."""

    library: Library
    device_type: str


_emulated: _Emulated | None = None


@contextmanager
def emulated(path: str | None, namespace: str = "", device_type: str = "cpu") -> Iterator[None]:
    """Take another library in the block, whose operators take tensors of another device; for tests.

    Without a path the backend can be asked what it takes, and not called.
    """
    global _emulated
    if path is not None:
        torch.ops.load_library(path)
    ops = None if path is None else getattr(torch.ops, namespace)
    before, _emulated = _emulated, _Emulated(Library(ops, ""), device_type)
    try:
        yield
    finally:
        _emulated = before


def _library() -> Library:
    return library.load() if _emulated is None else _emulated.library


def _device_type() -> str:
    return "cuda" if _emulated is None else _emulated.device_type


def prepare(place: torch.device) -> None:
    """Build the library where that is possible and has not been done; ``unsupported`` says why it is not there."""
    if _emulated is None and place.type == "cuda":
        library.load(build=True)


def absence() -> str:
    """Why there is no library, in one line; empty where there is one."""
    return _library().absence


def routes(device_type: str) -> tuple[str, ...]:
    """Names of the ways in which a call can be computed, where the library has been built."""
    return ROUTES if device_type == _device_type() and _library().ops is not None else ()


def guess(args: AttentionArgs) -> str:
    """The route that is taken where none is asked for: of decoding's, the one that the library estimates."""
    if unsupported(args):
        return ROUTES[0]
    if _cannot(args, decodes=True):
        return "fused"
    return DECODE_ROUTES[_library().ops.decode_route.default(*_inputs(args, None)) - 1]


def unsupported(args: AttentionArgs, route: str | None = None) -> list[str]:
    """Why this backend, or one route of it, cannot take the call; empty when it can."""
    place, q, wanted = args.q.device, args.q, _device_type()
    reasons = []
    if missing := absence():
        reasons.append(missing)
    if place.type != wanted:
        reasons.append(f"device {place.type}: its kernels are for {wanted}")
    elif place.type == "cuda" and 0 < machine.compute_capability(place) < LEAST_CAPABILITY:
        reasons.append(f"device: compute capability {machine.compute_capability(place) / 10}, the kernels need 8.0")
    if q.dtype not in _DTYPES:
        reasons.append(f"dtype {q.dtype}: its kernels take bf16 and fp16")
    if q.shape[0] * q.shape[1] * q.shape[2] > LARGEST_INT:
        reasons.append(f"q: more than {LARGEST_INT} rows")
    if args.window is not None and args.window > LARGEST_INT:
        reasons.append(f"window: at most {LARGEST_INT}")
    if args.bias is not None:
        reasons.append("bias: not in its kernels")
    if args.dropout_p > 0.0:
        reasons.append("dropout_p: not in its kernels")
    if route is not None:
        return reasons + _cannot(args, route in DECODE_ROUTES, route)
    decoding = _cannot(args, decodes=True)
    if not decoding or not (fused := _cannot(args, decodes=False)):
        return reasons
    return reasons + (decoding if q.shape[2] <= LARGEST_SEQ else fused)


def _cannot(args: AttentionArgs, decodes: bool, route: str | None = None) -> list[str]:
    """Reasons of decoding's kernels, or of the forward's for many query tokens."""
    reasons, q = [], args.q
    widest = LARGEST_HEAD_DIM if decodes else LARGEST_FUSED_HEAD_DIM
    for name, dim in (("q", q.shape[3]), ("v", args.v.shape[3])):
        if dim % 8 or not 0 < dim <= widest:
            reasons.append(f"{name}: head dim {dim}, its kernels take multiples of 8 up to {widest}")
    if not decodes:
        return reasons
    if q.shape[2] > LARGEST_SEQ:
        reasons.append(f"q: {q.shape[2]} tokens, at most {LARGEST_SEQ} are decoded")
    if args.segment_ids is not None:
        reasons.append("segment_ids: not in its kernels that decode")
    if route == "split_kv" and args.prefix_ids is not None and args.prefix_ids.dim() == 2:
        reasons.append("split_kv: takes one prefix for all tokens of a sample")
    return reasons


def fwd(args: AttentionArgs, route: str | None = None) -> tuple[Tensor, Tensor]:
    """``o [B, H, S, D_v]`` and ``lse [B, H, S]`` of the merged softmax; without a route, by the one that is guessed."""
    ops = _library().ops
    if ops is None:
        raise UnsupportedError(f"backend 'cuda' cannot take this call:\n  {absence()}")
    fused = route == "fused" or (route is None and bool(_cannot(args, decodes=True)))
    if not fused:
        found: tuple[Tensor, Tensor] = ops.decode.default(*_inputs(args, route))
        return found
    q, k, v, prefix_k, prefix_v, *others = _inputs(args, route)
    found = ops.fused.default(q, *map(unexpanded, (k, v, prefix_k, prefix_v)), *others)
    return found


def backward_unsupported(args: AttentionArgs) -> list[str]:
    """Why there are no gradients of a call that this backend takes; empty when there are."""
    return [f"gradients: {reason}" for reason in _cannot(args, decodes=False)]


def bwd(args: AttentionArgs, o: Tensor, lse: Tensor, do: Tensor, needs: Needs, route: str | None = None) -> Grads:
    """Gradients of :func:`fwd`, by whichever route; what nothing needs is not computed."""
    ops = _library().ops
    if reasons := backward_unsupported(args) if ops else [absence()]:
        raise UnsupportedError("backend 'cuda' cannot take this call:\n  " + "\n  ".join(reasons))
    inputs = (args.q, args.k, args.v, args.prefix_k, args.prefix_v, args.prefix_bias)
    asked = (*needs[:5], needs.prefix_bias and args.prefix_bias is not None)
    if args.q.numel() == 0:
        found = tuple(torch.zeros_like(x) if need and x is not None else None for x, need in zip(inputs, asked))
    else:
        found = ops.backward.default(*_inputs(args, None), aligned(o), lse.contiguous(), aligned(do), *asked)
    q, k, v, *of_prefix = (x if need else None for x, need in zip(found, asked))
    prefix_k, prefix_v, prefix_bias = (
        None if grad is None or x is None else grad.view(x.shape).to(x.dtype) for grad, x in zip(of_prefix, inputs[3:])
    )
    return Grads(q, k, v, prefix_k, prefix_v, prefix_bias=prefix_bias)


def _inputs(args: AttentionArgs, route: str | None) -> tuple[Any, ...]:
    """The arguments in the order of the schema in ``csrc/cuda/operators.cpp``."""
    q, start = args.q, args.q_start
    start_tensor, number = (start, 0) if isinstance(start, Tensor) else (None, start)
    sinks, padding, prefix_k, prefix_v = args.sinks, args.key_padding_mask, args.prefix_k, args.prefix_v
    bias = args.prefix_bias
    if prefix_k.dtype != q.dtype:
        prefix_k, prefix_v = prefix_k.to(q.dtype), prefix_v.to(q.dtype)
    return (
        aligned(q),
        aligned(args.k),
        aligned(args.v),
        aligned(prefix_k),
        aligned(prefix_v),
        None if sinks is None else sinks.to(torch.float32).contiguous(),
        None if padding is None else padding.view(torch.uint8),
        None if args.segment_ids is None else in_32_bits(args.segment_ids),
        start_tensor,
        args.prefix_ids,
        args.prefix_lens,
        None if bias is None else bias.to(torch.float32).contiguous(),
        args.k.shape[2] - q.shape[2] if number is None else number,
        args.causal,
        args.scale,
        args.window or 0,
        args.softcap or 0.0,
        DECODE_ROUTES.index(route) + 1 if route in DECODE_ROUTES else _AUTO,
    )


def in_32_bits(ids: Tensor) -> Tensor:
    """Ids ``[B, T]`` of 32 bits that are equal where these are: themselves, or the ranks of longer ones."""
    if ids.dtype == torch.int32:
        return ids
    return torch.searchsorted(ids.sort(dim=1).values, ids.contiguous(), out_int32=True)


def unexpanded(x: Tensor) -> Tensor:
    """Keys or values for the copy engine, which takes no row for several: itself, or a copy where one was expanded."""
    return x.clone(memory_format=torch.contiguous_format) if x.stride(-2) == 0 and x.shape[-2] > 1 else x


def aligned(x: Tensor) -> Tensor:
    """A tensor whose rows are dense and begin at multiples of 16 bytes: itself, or a copy where it is none."""
    stride = x.stride()
    if stride[-1] == 1 and x.data_ptr() % ALIGNMENT == 0:
        # Nearly every tensor passes this first look; a dimension of one element may have any stride.
        if not (stride[0] % STEP or stride[-3] % STEP or stride[-2] % STEP):
            return x
        if all(step % STEP == 0 or size == 1 for step, size in zip(stride[:-1], x.shape)):
            return x
    return x.clone(memory_format=torch.contiguous_format)
