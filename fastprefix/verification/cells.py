"""A cell: the direction, dtype, head dims and kind of arguments that a verdict holds for."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch

from ..types import DTYPES, AttentionArgs

Direction = Literal["forward", "backward", "decode"]
DIRECTIONS: tuple[Direction, ...] = get_args(Direction)

# Query tokens up to which a forward is a step of decoding, for which backends have routes of their own.
DECODE_UP_TO = 16

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

ANY = -1
LARGEST_TILE = 128
TILES = (ANY, 0, 16, 32, 64, LARGEST_TILE)

# What a call may have beside its five tensors, in the order in which a cell names it.
FEATURES = (
    "causal",
    "padding",
    "segments",
    "window",
    "softcap",
    "sinks",
    "bias",
    "bool-bias",
    "bias-dtype",  # a float one's is not q's; sinks-dtype likewise
    "sinks-dtype",
    "bias-grad",
    "bank",
    "bank-by-token",
    "ragged",
    "packed",
    "q_start",
    "q_start-tensor",
    "prefix-dtype",  # the prefix's is not q's, as with fp32 parameters in a bf16 model
    "prefix-bias",
    "scale",  # 0 or negative
    "dropout",
)


class Cell(NamedTuple):
    """The kind of a call. Equal kernels run for all calls of one kind, up to their sizes.

    ``G`` is the number of query heads that share a key/value head. ``P`` is the size of the tile that the prefix fills,
    which kernels of a GPU are compiled for, :data:`LARGEST_TILE` where it fills several; on a processor :data:`ANY`.
    """

    direction: Direction
    dtype: str
    D: int
    D_v: int
    G: int
    P: int
    features: tuple[str, ...]

    def __str__(self) -> str:
        tile = "any" if self.P == ANY else str(self.P)
        features = "+".join(self.features) or "plain"
        return f"{self.direction} {self.dtype} {self.D}x{self.D_v} G{self.G} P{tile} {features}"

    @classmethod
    def parse(cls, text: str) -> Cell:
        """The inverse of ``str``.

        Raises:
            ValueError: the text names no cell.
        """
        direction, dtype, dims, groups, tile, features = text.split(" ")
        D, D_v, G = (int(x) for x in (*dims.split("x"), groups.removeprefix("G")))
        P = ANY if tile == "Pany" else int(tile.removeprefix("P"))
        named = () if features == "plain" else tuple(features.split("+"))
        known = direction in DIRECTIONS and dtype in DTYPES and P in TILES
        if not known or min(D, D_v, G) < 1:
            raise ValueError(f"cell: got {text!r}, expected a direction, a dtype, head dims and features")
        if not set(named) <= set(FEATURES):
            raise ValueError(f"cell: got {text!r}, expected features of {', '.join(FEATURES)}")
        return cls(direction, dtype, D, D_v, G, P, named)  # type: ignore[arg-type]


def direction_of(args: AttentionArgs) -> Direction:
    """What a forward of these arguments is."""
    return "decode" if args.q.shape[2] <= DECODE_UP_TO else "forward"


def cell_of(args: AttentionArgs, direction: Direction) -> Cell:
    """The cell that a call belongs to."""
    q, v = args.q, args.v
    return Cell(direction, DTYPE_NAMES[q.dtype], q.shape[3], v.shape[3], args.groups, _tile(args), _features(args))


def _tile(args: AttentionArgs) -> int:
    tokens = args.num_prefix_tokens
    if args.q.device.type == "cpu":
        return ANY
    return min((tile for tile in TILES if tile >= tokens), default=LARGEST_TILE)


def _features(args: AttentionArgs) -> tuple[str, ...]:
    bias, ids, start = args.bias, args.prefix_ids, args.q_start
    present = (
        args.causal,
        args.key_padding_mask is not None,
        args.segment_ids is not None,
        args.window is not None,
        args.softcap is not None,
        args.sinks is not None,
        bias is not None and bias.dtype != torch.bool,
        bias is not None and bias.dtype == torch.bool,
        bias is not None and bias.dtype not in (torch.bool, args.q.dtype),
        args.sinks is not None and args.sinks.dtype != args.q.dtype,
        args.bias_grad,
        ids is not None and ids.dim() == 1,
        ids is not None and ids.dim() == 2,
        args.prefix_lens is not None and not args.packed,
        args.packed,
        isinstance(start, int),
        isinstance(start, torch.Tensor),
        args.prefix_k.dtype != args.q.dtype,
        args.prefix_bias is not None,
        args.scale <= 0.0,
        args.dropout_p > 0.0,
    )
    return tuple(name for name, has in zip(FEATURES, present, strict=True) if has)


def signature(args: AttentionArgs, direction: str) -> tuple[object, ...]:
    """What decides which backends are tried for a call: equal for calls of one cell, device and size.

    A table's key, made at every call: it has no tensor in it and costs a microsecond.
    """
    q, prefix_k, bias, ids, start = args.q, args.prefix_k, args.bias, args.prefix_ids, args.q_start
    return (
        direction,
        q.shape,
        prefix_k.shape,
        args.v.shape[3],
        args.k.shape[2].bit_length(),
        q.dtype,
        prefix_k.dtype,
        q.device,
        args.causal,
        args.key_padding_mask is None,
        args.segment_ids is None,
        args.window is None,
        args.softcap is None,
        None if args.sinks is None else args.sinks.dtype,
        None if bias is None else bias.dtype,
        args.bias_grad,
        None if ids is None else ids.dim(),
        args.prefix_lens is None,
        args.prefix_bias is None,
        None if start is None else type(start),
        args.scale <= 0.0,
        args.dropout_p > 0.0,
    )
