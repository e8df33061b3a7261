"""Launches of decoding (few query tokens, many keys): partial softmaxes of splits of the keys, then one merge."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..._triton.decode_combine import _prefix_attn_decode_combine_kernel
from ..._triton.decode_content import _prefix_attn_decode_content_kernel
from ..._triton.decode_prefix import _prefix_attn_decode_prefix_kernel
from ...types import AttentionArgs
from . import kernel_args, launcher, tile_config
from .kernel_args import block_width, constants, empty_bshd, is_common_case
from .prefix_bank import rows_by_prefix, unit_is_token
from .tile_config import Tile

LARGEST_SEQ = 16
# Rows of a sample and key/value head: of the fused forward's tile, and up to which it is at least half padding, so
# that its time is that of reading keys.
FUSED_ROWS = 128
FEW_ROWS = 64
# What two more launches and the partial softmaxes cost, about 5 us, in bytes of keys and values: so much one
# multiprocessor of an H100 reads by itself in that time, and so much all of them from the second-level cache.
# Estimates.
BYTES_ALONE = 512 * 1024
BYTES_TOGETHER = 32 * 1024 * 1024
# Beyond this the partial softmaxes cost more than the splits save.
MOST_SPLITS = 128
# The last stage: numbers that a program holds, and splits that it reads at once.
COMBINED = 1024
COMBINED_SPLITS = 16


class PartialSoftmax(NamedTuple):
    """Running softmaxes of all splits, the prefix's first; fp32."""

    acc: Tensor  # [splits, B * H * S, D_v], not normalised
    m: Tensor  # [splits, B * H * S], base 2
    l: Tensor  # [splits, B * H * S]


class SplitPlan(NamedTuple):
    """How a part is cut: tiles of rows (for one key/value head, the content's for one sample) and splits of keys."""

    tile: Tile
    block_m: int
    tiles: int
    splits: int


def preferred(args: AttentionArgs) -> bool:
    """Whether three small kernels beat the fused forward, by shapes alone.

    They do when a few rows see many keys, and either the fused forward, one program for each sample and key/value
    head, leaves multiprocessors idle that splits would use, or its programs, mostly padding, read a long prefix
    again and again.
    """
    batch, _, seq, head_dim = args.q.shape
    if args.q.numel() == 0 or seq > LARGEST_SEQ:
        return False
    rows, tokens, samples = seq * args.groups, args.num_prefix_tokens, batch * args.k.shape[1]
    key_bytes = (head_dim + args.v.shape[3]) * args.q.element_size()
    if samples * -(-rows // FUSED_ROWS) < launcher.num_sms(args.q):
        return (tokens + _visible(args)) * key_bytes >= BYTES_ALONE
    return batch > 1 and rows <= FEW_ROWS and samples * tokens * key_bytes >= BYTES_TOGETHER


def fwd(args: AttentionArgs, prefix_lse: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``o [B, H, S, D_v]`` and ``lse [B, H, S]``; the prefix's own log-sum-exp is written where it is asked for."""
    batch, heads, seq, _ = args.q.shape
    o = empty_bshd(args.q, args.v.shape[3])
    lse = args.q.new_empty(batch, heads, seq, dtype=torch.float32)
    if o.numel() == 0:
        return o, lse
    prefix, content = _plan_prefix(args), _plan_content(args)
    shape = (prefix.splits + content.splits, batch * heads * seq)
    room = (args.q.new_empty(*shape, *last, dtype=torch.float32) for last in ((args.v.shape[3],), (), ()))
    partial = PartialSoftmax(*room)
    if prefix.splits:
        _prefix(args, prefix, partial)
    if content.splits:
        _content(args, content, partial, prefix.splits)
    _combine(args, prefix.splits, partial, o, lse, prefix_lse)
    return o, lse


def _plan_prefix(args: AttentionArgs) -> SplitPlan:
    rows, tokens = args.q.shape[0] * args.q.shape[2] * args.groups, args.num_prefix_tokens
    # How many rows each prefix has only the device knows; each that has any may end in a tile that is not full.
    used = 1 if args.prefix_ids is None else min(args.prefix_k.shape[0], args.prefix_ids.numel())
    # Looking up where a bank's rows are takes registers.
    tile, block_m = _tile(
        "decode_prefix", args, -(-rows // used), general=args.prefix_ids is not None or args.prefix_bias is not None
    )
    count = (rows - used) // block_m + used
    block_p = kernel_args.prefix_block(tokens, tile.BLOCK_P)
    return SplitPlan(tile, block_m, count, _splits(args, count * args.k.shape[1], -(-tokens // block_p)))


def _plan_content(args: AttentionArgs) -> SplitPlan:
    rows = args.q.shape[2] * args.groups
    tile, block_m = _tile("decode_content", args, rows, general=not is_common_case(args))
    count = -(-rows // block_m)
    blocks = args.q.shape[0] * args.k.shape[1] * count
    return SplitPlan(tile, block_m, count, _splits(args, blocks, -(-_visible(args) // tile.BLOCK_N)))


def _tile(kernel: str, args: AttentionArgs, rows: int, general: bool) -> tuple[Tile, int]:
    """A kernel's tile, by rows instead of query tokens, and BLOCK_M: no more than there are rows."""
    rows = max(16, _power_of_two(rows))
    dim = block_width(max(args.q.shape[3], args.v.shape[3]))
    shape = (launcher.device(args.q), dim, args.q.element_size(), rows)
    if general and tile_config.has(kernel + tile_config.GENERAL, *shape):
        kernel += tile_config.GENERAL
    tile = tile_config.tile(kernel, *shape)
    return tile, min(tile.BLOCK_M, rows)


def _splits(args: AttentionArgs, blocks: int, key_tiles: int) -> int:
    """Splits that give each multiprocessor two programs, each at least one tile of keys; 0 where there is none."""
    wanted = min(-(-2 * launcher.num_sms(args.q) // blocks), MOST_SPLITS, key_tiles)
    return -(-key_tiles // -(-key_tiles // wanted)) if wanted else 0


def _visible(args: AttentionArgs) -> int:
    """Most content keys that a sample's rows see, as far as the host knows."""
    keys, seq = args.k.shape[2], args.q.shape[2]
    if args.causal and isinstance(args.q_start, int):
        keys = max(0, min(keys, args.q_start + seq))
    return keys if args.window is None else min(keys, args.window + seq - 1)


def _power_of_two(x: int) -> int:
    return 1 << (x - 1).bit_length()


def _prefix(args: AttentionArgs, plan: SplitPlan, partial: PartialSoftmax) -> None:
    batch, heads, seq, _ = args.q.shape
    shape, tokens, heads_kv = constants(args), args.num_prefix_tokens, args.k.shape[1]
    block_p = kernel_args.prefix_block(tokens, plan.tile.BLOCK_P)
    prefix_k, prefix_v = kernel_args.prefix(args)
    # A descriptor ends where the tensor does, not where a shorter prefix of the bank does.
    tma, (k, v) = kernel_args.boxes(
        plan.tile.TMA and args.prefix_lens is None,
        (prefix_k, [1, 1, block_p, shape["BLOCK_D"]]),
        (prefix_v, [1, 1, block_p, shape["BLOCK_DV"]]),
    )
    launcher.launch(
        _prefix_attn_decode_prefix_kernel,
        plan.splits * heads_kv * plan.tiles,
        *(kernel_args.strided(args.q), k, v, *partial, rows_by_prefix(args), kernel_args.bank(args)),
        *(args.scale, args.softcap, batch, seq, tokens, prefix_k.shape[0], heads_kv),
        *(plan.tiles, batch * heads * seq, plan.splits),
        tile=plan.tile,
        place=args.q,
        UNIT_IS_TOKEN=unit_is_token(args),
        BLOCK_M=plan.block_m,
        BLOCK_P=block_p,
        BLOCK_BANK=_power_of_two(prefix_k.shape[0]),
        TMA=tma,
        **shape,
    )


def _content(args: AttentionArgs, plan: SplitPlan, partial: PartialSoftmax, first_split: int) -> None:
    batch, heads, seq, _ = args.q.shape
    shape, keys, heads_kv = constants(args), args.k.shape[2], args.k.shape[1]
    mask, q_start, masked = kernel_args.mask(args)
    box = [1, 1, plan.tile.BLOCK_N]
    tma, (k, v) = kernel_args.boxes(
        plan.tile.TMA, (args.k, [*box, shape["BLOCK_D"]]), (args.v, [*box, shape["BLOCK_DV"]])
    )
    launcher.launch(
        _prefix_attn_decode_content_kernel,
        batch * heads_kv * plan.splits * plan.tiles,
        *(kernel_args.strided(args.q), k, v, *partial, mask, q_start, args.scale, args.softcap),
        *(seq, keys, heads_kv, batch * heads * seq, plan.splits, first_split),
        tile=plan.tile,
        place=args.q,
        CAUSAL=args.causal,
        MASKED=masked,
        BLOCK_M=plan.block_m,
        BLOCK_N=plan.tile.BLOCK_N,
        TMA=tma,
        **shape,
    )


def _combine(
    args: AttentionArgs, prefix_splits: int, partial: PartialSoftmax, o: Tensor, lse: Tensor, prefix_lse: Tensor | None
) -> None:
    splits, rows = partial.m.shape
    width = args.v.shape[3]
    block_s = min(COMBINED_SPLITS, COMBINED // block_width(width), _power_of_two(max(splits, 1)))
    # Rows that a program has room for, but no fewer programs than multiprocessors where there are rows for them.
    block_m = min(COMBINED // (block_s * block_width(width)), _power_of_two(rows // launcher.num_sms(args.q) + 1))
    launcher.launch(
        _prefix_attn_decode_combine_kernel,
        -(-rows // block_m),
        *(*partial, kernel_args.strided(o), lse, prefix_lse, args.sinks, kernel_args.bank(args)),
        *(args.q.shape[1], args.q.shape[2], rows, prefix_splits, splits),
        tile=Tile(num_warps=4, num_stages=1),
        place=args.q,
        D_V=width,
        BLOCK_M=block_m,
        BLOCK_S=block_s,
        BLOCK_DV=block_width(width),
    )
