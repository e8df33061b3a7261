"""From the operator's arguments to those of kernels: tiles, tensors, masks, banks and compile-time sizes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..._triton.kernel_structs import Bank, Mask, Strided
from ...types import AttentionArgs
from . import launcher, tile_config
from .tile_config import Tile


def block_width(dim: int) -> int:
    """A head dim as kernels see it: a power of two that a tensor core takes."""
    return max(16, 1 << (dim - 1).bit_length())


def constants(args: AttentionArgs) -> dict[str, Any]:
    """Compile-time sizes of every kernel: G, D, D_V, BLOCK_D, BLOCK_DV."""
    head_dim, width = args.q.shape[3], args.v.shape[3]
    return {
        "G": args.groups,
        "D": head_dim,
        "D_V": width,
        "BLOCK_D": block_width(head_dim),
        "BLOCK_DV": block_width(width),
    }


def tile_for(args: AttentionArgs, kernel: str, general: bool = False) -> Tile:
    """The tile of a kernel for a call; ``general`` asks for the one that serves any arguments and strides."""
    device, widest = launcher.device(args.q), block_width(max(args.q.shape[3], args.v.shape[3]))
    shape = (device, widest, args.q.element_size(), args.q.shape[2])
    if (general or not is_common_case(args)) and tile_config.has(kernel + tile_config.GENERAL, *shape):
        kernel += tile_config.GENERAL
    return tile_config.tile(kernel, *shape)


def is_common_case(args: AttentionArgs) -> bool:
    """Whether the call has no rare argument: causality, padding, a window and one prefix a sample are common."""
    per_row = args.prefix_ids is not None and args.prefix_ids.dim() == 2
    rare = (args.softcap, args.segment_ids, args.bias, args.prefix_lens, args.prefix_bias)
    return not per_row and all(x is None for x in rare)


def key_sources(args: AttentionArgs, kernel: str) -> tuple[Tile, bool, list[Any]]:
    """The tile, whether keys come through descriptors, and k, v, prefix_k, prefix_v as the kernel takes them."""
    tile, widths = tile_for(args, kernel), (block_width(args.q.shape[3]), block_width(args.v.shape[3]))
    if tile.TMA:
        tma, sources = boxes(True, *key_boxes(args, tile, *widths))
        if tma:
            return tile, True, sources
        tile = tile_for(args, kernel, general=True)
    return tile, False, [strided(x) for x in (args.k, args.v, *prefix(args))]


def row_sources(args: AttentionArgs, kernel: str, do: Tensor) -> tuple[Tile, bool, list[Any]]:
    """The tile, whether query rows come through descriptors, and q, do as the kernel takes them."""
    tile, widths = tile_for(args, kernel), (block_width(args.q.shape[3]), block_width(args.v.shape[3]))
    if tile.TMA:
        pairs = row_boxes(tile, args.groups, *zip((args.q, do), widths, strict=True))
        tma, sources = boxes(True, *pairs)
        if tma:
            return tile, True, sources
        tile = tile_for(args, kernel, general=True)
    return tile, False, [strided(x) for x in (args.q, do)]


def row_tiles(args: AttentionArgs, tile: Tile) -> int:
    """Programs that own packed rows: ``B * H_kv * cdiv(S * G, BLOCK_M)``."""
    return args.q.shape[0] * args.k.shape[1] * -(-args.q.shape[2] * args.groups // tile.BLOCK_M)


def empty_bshd(x: Tensor, dim: int | None = None) -> Tensor:
    """An empty ``[B, H, S, D]`` in [B, S, H, D] storage, as models hold it; of x's shape but for ``dim``, if given."""
    batch, heads, seq, own = x.shape
    return x.new_empty(batch, seq, heads, own if dim is None else dim).transpose(1, 2)


def strided(x: Tensor) -> Strided:
    """A 4-D tensor and its strides."""
    return Strided(x, *x.stride())


def boxes(wanted: bool, *pairs: tuple[Tensor, list[int]]) -> tuple[bool, list[Any]]:
    """Tensor descriptors with boxes of these sizes, or strides for all where that is not wanted or one cannot."""
    if wanted and describable(*(x for x, _ in pairs)):
        return True, [TensorDescriptor(x, list(x.shape), list(x.stride()), block) for x, block in pairs]
    return False, [strided(x) for x, _ in pairs]


def describable(*tensors: Tensor) -> bool:
    """Whether there are any, and the copy engine takes them all."""
    return bool(tensors) and all(_describable(x) for x in tensors)


def _describable(x: Tensor) -> bool:
    """The copy engine takes 16-byte aligned rows of adjacent elements, and no empty or repeated dimension."""
    *outer, inner = x.stride()
    aligned = x.data_ptr() % 16 == 0 and all(stride > 0 and stride * x.element_size() % 16 == 0 for stride in outer)
    return inner == 1 and aligned and x.numel() > 0


def row_boxes(tile: Tile, groups: int, *pairs: tuple[Tensor, int]) -> list[tuple[Tensor, list[int]]]:
    """Boxes of packed query rows, ``[B, H, S, D]`` each with its BLOCK_D; none where a group is no box."""
    if groups & (groups - 1) or tile.BLOCK_M % groups:
        return []
    return [(x.transpose(1, 2), [1, tile.BLOCK_M // groups, groups, block]) for x, block in pairs]


def key_boxes(args: AttentionArgs, tile: Tile, block_d: int, block_dv: int) -> list[tuple[Tensor, list[int]]]:
    """Boxes of k, v, prefix_k, prefix_v; none where a prefix of the bank ends before its tensor does."""
    if args.prefix_lens is not None:
        return []
    prefix_k, prefix_v = prefix(args)
    # An empty tensor is never read, but its descriptor has to be a valid one.
    k, v = (args.k, args.v) if args.k.numel() else (prefix_k, prefix_v)
    prefix_k, prefix_v = (prefix_k, prefix_v) if prefix_k.numel() else (k, v)
    keys, tokens = [1, 1, tile.BLOCK_N], [1, 1, prefix_block(args.num_prefix_tokens, tile.BLOCK_P)]
    widths = (block_d, block_dv)
    content = [(x, [*keys, width]) for x, width in zip((k, v), widths, strict=True)]
    return content + [(x, [*tokens, width]) for x, width in zip((prefix_k, prefix_v), widths, strict=True)]


def prefix(args: AttentionArgs) -> tuple[Tensor, Tensor]:
    """The prefix in q's dtype as a bank ``[N, H_kv, P, D]``."""
    found = (x.detach().to(args.q.dtype) for x in (args.prefix_k, args.prefix_v))
    prefix_k, prefix_v = (x if x.dim() == 4 else x.unsqueeze(0) for x in found)
    return prefix_k, prefix_v


def bank(args: AttentionArgs) -> Bank:
    """Ids and lengths, per sample or per row, and the bias."""
    ids, lens, bias = args.prefix_ids, args.prefix_lens, args.prefix_bias
    added: tuple[Any, ...] = (None,) * 3
    if bias is not None:
        bias = bias.detach().to(torch.float32).contiguous()
        added = (bias, *(bias if bias.dim() == 3 else bias.unsqueeze(0)).stride()[:2])
    if ids is None:
        return Bank(None, None, None, None, *added)
    per_row = ids.stride(1) if ids.dim() == 2 else None
    return Bank(ids, ids.stride(0), per_row, None if lens is None else lens.contiguous(), *added)


def mask(args: AttentionArgs) -> tuple[Mask, int, bool]:
    """The mask, ``q_start`` where it is a number, and whether anything but causality hides a key."""
    start, number, stride = args.q_start, 0, None
    if isinstance(start, Tensor):
        stride = start.stride(0) if start.numel() > 1 else 0
    else:
        number = args.k.shape[2] - args.q.shape[2] if start is None else start
        start = None
    padding, segments = args.key_padding_mask, args.segment_ids
    found = Mask(
        start,
        stride,
        args.window,
        *(None, None, None) if padding is None else (padding.view(torch.uint8), *padding.stride()),
        *(None, None, None) if segments is None else (segments, *segments.stride()),
        *_bias(args),
    )
    masked = any(x is not None for x in (args.window, padding, segments, args.bias))
    return found, number, masked


def _bias(args: AttentionArgs) -> tuple[Any, ...]:
    if args.bias is None:
        return (None,) * 5
    bias = args.bias.detach()
    bias = bias.view(torch.uint8) if bias.dtype == torch.bool else bias
    bias = bias.expand(*args.q.shape[:3], args.k.shape[2])
    return bias, *bias.stride()


def prefix_block(tokens: int, largest: int) -> int:
    """BLOCK_P: the next power of two of P, between 16 and what the tile table allows."""
    return max(16, min(largest, 1 << max(tokens - 1, 0).bit_length()))
