"""For each kernel that has tiles, a call on meta tensors that launches it, and the variants of that call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastprefix.backends import triton
from fastprefix.measure.operator.problem import DTYPES
from fastprefix.types import AttentionArgs, Needs

DTYPE_NAMES = {2: "bf16", 4: "fp32"}  # by bytes an element
HEADS_KV = 8
ALL = Needs(True, True, True, True, True)
DQ, DKDV = Needs(True, False, False, False, False), Needs(False, True, True, False, False)


@dataclass(frozen=True)
class Variant:
    """A variant of a kernel's call, for which Triton compiles separate code."""

    name: str
    has: tuple[str, ...] = ()  # any of padding, window, softcap, segments, bias, bank, strides
    P: int | None = None  # prefix tokens; None for as many as the tile's BLOCK_P
    groups: int = 4  # query heads of a key/value head; 3 needs divisions, and its rows fit no tensor descriptor
    needs: Needs | None = None  # None for the needs of the kernel's call


@dataclass(frozen=True)
class KernelCall:
    """How to call a kernel: the variants that change its code, and the sizes of a call for a row's ``S``."""

    run: Callable[[AttentionArgs, Needs], object]
    variants: tuple[Variant, ...]
    quick: tuple[Variant, ...]  # the variants that take most resources, for a quick survey; rows take the first
    needs: Needs = ALL
    refuses: Callable[[AttentionArgs], list[str]] = triton.unsupported
    sizes: Callable[[int], tuple[int, int, int]] = lambda S: (8, S, S)  # B, S, T

    def __call__(self, variant: Variant, D: int, itemsize: int, S: int, P: int) -> bool:
        """Make the call with ``P`` prefix tokens while launches are recorded; False if the backend refuses it."""
        args = _args(variant, D, DTYPES[DTYPE_NAMES[itemsize]], P, *self.sizes(S))
        if self.refuses(args):
            return False
        self.run(args, variant.needs or self.needs)
        return True


def _forward(args: AttentionArgs, needs: Needs) -> None:
    from fastprefix.backends.launch import forward

    forward.fused(args)


def _backward(args: AttentionArgs, needs: Needs) -> None:
    triton.bwd(args, *_results(args), _like(args.q), needs)


def _epilogue(args: AttentionArgs, needs: Needs) -> None:
    from fastprefix.backends.launch import epilogue

    epilogue.fwd(args, *_results(args))


def _epilogue_refuses(args: AttentionArgs) -> list[str]:
    from fastprefix.backends.launch import epilogue

    return epilogue.reasons(args)


def _epilogue_backward_refuses(args: AttentionArgs) -> list[str]:
    from fastprefix.backends.launch import epilogue

    return epilogue.bwd_reasons(args)


def _epilogue_backward(args: AttentionArgs, needs: Needs) -> None:
    from fastprefix.backends.launch import epilogue

    epilogue.bwd(args, *_results(args), _like(args.q), _like(args.q), needs)


def _decode(args: AttentionArgs, needs: Needs) -> None:
    from fastprefix.backends.launch import split_kv_decode

    split_kv_decode.fwd(args)


P16, G3, PADDED = Variant("P 16", P=16), Variant("G 3", groups=3), Variant("padding, window", ("padding", "window"))
PREFIX_ONLY = Variant("prefix only", needs=Needs(False, False, False, True, True))
STRIDES = Variant("strides", ("strides",), groups=3)
CAPPED, PACKED = Variant("softcap, window", ("softcap", "window")), Variant("segments", ("segments",))
BIASED, BANK = Variant("bias", ("bias",)), Variant("bank, padding", ("bank", "padding"))
COMMON, RARE = (P16, G3, PADDED), (STRIDES, CAPPED, PACKED, BIASED)
KERNEL_CALLS = {
    "fwd": KernelCall(_forward, (*COMMON, *RARE, BANK), (BIASED, G3)),
    "bwd_dq": KernelCall(_backward, (*COMMON, *RARE, BANK), (BIASED, G3), DQ),
    "bwd_dkdv": KernelCall(_backward, (P16, PADDED, *RARE), (BIASED, PADDED), DKDV),
    "bwd_dprefix": KernelCall(_backward, (P16, G3, PREFIX_ONLY, CAPPED, BANK), (BANK, G3)),
    "epilogue_fwd": KernelCall(_epilogue, (P16, G3, CAPPED, BANK), (BANK, G3), refuses=_epilogue_refuses),
    "epilogue_bwd": KernelCall(
        _epilogue_backward, (P16, G3, PREFIX_ONLY, CAPPED), (CAPPED, G3), refuses=_epilogue_backward_refuses
    ),
    # Their rows in the tables count B * S * G and S * G queries, rounded up to a power of two.
    "decode_prefix": KernelCall(
        _decode, (P16, G3, CAPPED, BANK), (BANK, G3), sizes=lambda S: (max(S // 4, 1), 1, 4096)
    ),
    "decode_content": KernelCall(_decode, (*COMMON, *RARE), (BIASED, G3), sizes=lambda S: (8, max(S // 4, 1), 4096)),
}
# Kernels without tiles, compiled wherever a call above launches them. They have no matrix products.
HELPERS = ("bwd_delta", "bwd_reduce", "decode_combine")


def matmul_rows(kernel: str, options: Mapping[str, Any]) -> int | None:
    """The smallest M of a kernel's matrix products, of which wgmma needs 64; None for a kernel without them."""
    if kernel in HELPERS:
        return None
    rows = options["BLOCK_M"]
    match kernel:
        case "bwd_dkdv":
            rows = options["BLOCK_N"]
        case "bwd_dprefix" if options["BLOCK_P"] >= 64:
            rows = options["BLOCK_P"]
        case "bwd_dprefix" | "epilogue_bwd":  # sums over rows are held transposed
            rows = min(rows, options["BLOCK_D"], options["BLOCK_DV"])
    return int(rows)


def content(B: int, H: int, S: int, D: int, dtype: torch.dtype) -> Tensor:
    """A meta tensor ``[B, H, S, D]`` with the strides that models give it."""
    return torch.empty(B, S, H, D, dtype=dtype, device="meta").transpose(1, 2)


def _like(x: Tensor) -> Tensor:
    B, H, S, D = x.shape
    return content(B, H, S, D, x.dtype)


def _results(args: AttentionArgs) -> tuple[Tensor, Tensor]:
    return _like(args.q), args.q.new_empty(args.q.shape[:3], dtype=torch.float32)


def _args(variant: Variant, D: int, dtype: torch.dtype, P: int, B: int, S: int, T: int) -> AttentionArgs:
    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    prefix = empty(HEADS_KV, P, D)
    q, k = (content(B, HEADS_KV * heads, length, D, dtype) for heads, length in ((variant.groups, S), (1, T)))
    if "strides" in variant.has:  # keys that are the same for all samples
        k = content(1, HEADS_KV, T, D, dtype).expand(B, -1, -1, -1)
    options: dict[str, Any] = {}
    for name in variant.has:
        match name:
            case "padding":
                options["key_padding_mask"] = empty(B, T, dtype=torch.bool)
            case "window":
                options["window"] = 512
            case "softcap":
                options["softcap"] = 30.0
            case "segments":
                options["segment_ids"] = empty(B, T, dtype=torch.long)
            case "bias":
                options["bias"] = empty(1, q.shape[1], S, T)
            case "bank":
                prefix = prefix[None]
                options["prefix_ids"] = empty(B, S, dtype=torch.long)
                options["prefix_lens"] = empty(1, dtype=torch.long)
    return AttentionArgs(q, k, k, prefix, prefix, scale=D**-0.5, **options)
