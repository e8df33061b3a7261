"""What launches have in common: constants, tiles, grids and room for results."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastprefix.backends.launch import arguments, run, tiles
from fastprefix.backends.launch.tiles import Tile
from fastprefix.types import AttentionArgs

# Tiles of the same kernel for rarer arguments and any strides: what those take in registers the others have for tiles.
GENERAL = "_general"


def padded(dim: int) -> int:
    """A head dim as kernels see it: a power of two that a tensor core takes."""
    return max(16, 1 << (dim - 1).bit_length())


def constants(args: AttentionArgs) -> dict[str, Any]:
    """What every kernel is compiled for: G, D, D_V, BLOCK_D, BLOCK_DV."""
    head_dim, width = args.q.shape[3], args.v.shape[3]
    return {"G": args.groups, "D": head_dim, "D_V": width, "BLOCK_D": padded(head_dim), "BLOCK_DV": padded(width)}


def tile_for(args: AttentionArgs, kernel: str, general: bool = False) -> Tile:
    """The tile of a kernel for a call; ``general`` asks for the one that serves any arguments and strides."""
    device, widest = run.device(args.q), padded(max(args.q.shape[3], args.v.shape[3]))
    shape = (device, widest, args.q.element_size(), args.q.shape[2])
    if (general or not lean(args)) and tiles.has(kernel + GENERAL, *shape):
        kernel += GENERAL
    return tiles.tile(kernel, *shape)


def lean(args: AttentionArgs) -> bool:
    """Whether the call has only what every model has: causality, padding, a window, one prefix a sample."""
    per_row = args.prefix_ids is not None and args.prefix_ids.dim() == 2
    rare = (args.softcap, args.segment_ids, args.bias, args.prefix_lens)
    return not per_row and all(x is None for x in rare)


def key_sources(args: AttentionArgs, kernel: str) -> tuple[Tile, bool, list[Any]]:
    """The tile, whether keys come through descriptors, and k, v, prefix_k, prefix_v as the kernel takes them."""
    tile, widths = tile_for(args, kernel), (padded(args.q.shape[3]), padded(args.v.shape[3]))
    if tile.TMA:
        tma, sources = arguments.boxes(True, *arguments.key_boxes(args, tile, *widths))
        if tma:
            return tile, True, sources
        tile = tile_for(args, kernel, general=True)
    return tile, False, [arguments.strided(x) for x in (args.k, args.v, *arguments.prefix(args))]


def row_sources(args: AttentionArgs, kernel: str, do: Tensor) -> tuple[Tile, bool, list[Any]]:
    """The tile, whether query rows come through descriptors, and q, do as the kernel takes them."""
    tile, widths = tile_for(args, kernel), (padded(args.q.shape[3]), padded(args.v.shape[3]))
    if tile.TMA:
        pairs = arguments.row_boxes(tile, args.groups, *zip((args.q, do), widths, strict=True))
        tma, sources = arguments.boxes(True, *pairs)
        if tma:
            return tile, True, sources
        tile = tile_for(args, kernel, general=True)
    return tile, False, [arguments.strided(x) for x in (args.q, do)]


def row_tiles(args: AttentionArgs, tile: Tile) -> int:
    """Programs that own packed rows: ``B * H_kv * cdiv(S * G, BLOCK_M)``."""
    return args.q.shape[0] * args.k.shape[1] * -(-args.q.shape[2] * args.groups // tile.BLOCK_M)


def token_major(x: Tensor, dim: int | None = None) -> Tensor:
    """Room like ``[B, H, S, D]`` in [B, S, H, D] storage, as models hold it."""
    batch, heads, seq, own = x.shape
    return x.new_empty(batch, seq, heads, own if dim is None else dim).transpose(1, 2)
