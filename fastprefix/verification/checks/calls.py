"""Small calls of a cell, on shapes that fill no tile, with every layout that models hand over."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...types import DTYPES, AttentionArgs
from ..cells import ANY, LARGEST_TILE, Cell

PREFIXES = 3  # in a bank


class Shape(NamedTuple):
    """Sizes of one call; each key/value head has as many query heads as the cell says.

    ``P`` is taken where the cell's prefixes may be of any length; else one that fills the cell's tile.
    """

    B: int
    H_kv: int
    S: int
    T: int
    P: int


# In turn content in [B, S, H, D] storage, in [B, H, S, D] storage with a longer cache, and as slices of one projection;
# of one, rows begin at no multiple of 16 bytes, as a copy engine wants them.
UNALIGNED = 3
ROWS = (
    Shape(3, 2, 67, 67, 7),
    Shape(2, 1, 33, 141, 130),
    Shape(1, 2, 98, 98, 40),
    Shape(2, 1, 21, 26, 20),
    Shape(1, 1, 35, 35, 0),
)
# Rows of a group, of one sample and of all together, fill tiles of 16 to 128; keys are few, and enough for many splits.
STEPS = (
    Shape(5, 2, 1, 33, 129),
    Shape(1, 1, 1, 900, 16),
    Shape(2, 2, 4, 50, 7),
    Shape(3, 1, 1, 20, 20),
    Shape(4, 2, 1, 24, 20),
    Shape(16, 1, 1, 20, 40),
    Shape(70, 1, 1, 9, 30),
    Shape(3, 2, 8, 40, 17),
    Shape(2, 1, 1, 9, 0),
    Shape(2, 1, 16, 40, 66),
    Shape(20, 8, 4, 16, 9),
    Shape(10, 1, 4, 16, 300),
)
# What an interpreter, at some 12 ms a program, has time for.
FEW_ROWS = (Shape(2, 1, 19, 19, 5), Shape(1, 2, 5, 21, 17))
FEW_STEPS = (Shape(2, 1, 1, 19, 17), Shape(1, 1, 3, 9, 0))
# A gated prefix is a call without content, and the content one without a prefix.
NO_CONTENT = Shape(2, 1, 19, 0, 9)
BANKS = {"bank", "bank-by-token"}
# Lengths that fill a tile: in part, whole, and of the largest more than one.
LENGTHS = {0: (0,), 16: (7, 16, 1), 32: (20, 32), 64: (40, 64), LARGEST_TILE: (130, 100, 700)}


def calls(cell: Cell, place: torch.device, few: bool = False) -> Iterator[tuple[str, AttentionArgs, Tensor]]:
    """Label, arguments and the gradient of the output, of each call of a cell; equal for equal cells."""
    has = set(cell.features)
    shapes = (FEW_STEPS if few else STEPS) if cell.direction == "decode" else (FEW_ROWS if few else ROWS)
    if not has - {"prefix-dtype", "softcap", "scale", "bank", "bank-by-token", "ragged", "packed"}:
        shapes = (*shapes, NO_CONTENT._replace(S=2) if cell.direction == "decode" else NO_CONTENT)
    for layout, shape in enumerate(shapes):
        x = shape
        if cell.P != ANY:
            x = x._replace(P=LENGTHS[cell.P][layout % len(LENGTHS[cell.P])])
        if has & BANKS and cell.P != 0:
            x = x._replace(P=max(x.P, 3))
        label = f"B{x.B} H{x.H_kv * cell.G}/{x.H_kv} S{x.S} T{x.T} P{x.P}"
        yield label, *_call(cell, x, layout, place)


def _call(cell: Cell, x: Shape, layout: int, place: torch.device) -> tuple[AttentionArgs, Tensor]:
    generator = torch.Generator().manual_seed(layout + 1)
    dtype = DTYPES[cell.dtype]

    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=generator).to(place, dtype)

    q, k, v = _content(cell, x, layout, normal)
    options = _options(cell, x, layout, normal, generator)
    lens = options.get("prefix_lens")
    lead: tuple[int, ...] = ()
    tokens = x.P
    if "packed" in cell.features:
        tokens = int(lens.sum()) if lens is not None else tokens
    elif "prefix_ids" in options:
        lead = (PREFIXES,)
    own = dtype
    if "prefix-dtype" in cell.features:
        own = torch.bfloat16 if dtype == torch.float32 else torch.float32
    prefix_k, prefix_v = (normal(*lead, x.H_kv, tokens, dim, dtype=own) for dim in (cell.D, cell.D_v))
    if "prefix-bias" in cell.features:
        options["prefix_bias"] = normal(*lead, x.H_kv, tokens, dtype=torch.float32)
        options["prefix_bias"][..., 1::16] = torch.finfo(torch.float32).min
    scale = -0.3 * cell.D**-0.5 if "scale" in cell.features else cell.D**-0.5
    moved: dict[str, Any] = {n: y.to(place) if isinstance(y, Tensor) else y for n, y in options.items()}
    args = AttentionArgs(q, k, v, prefix_k, prefix_v, scale=scale, **moved)
    return args, _output_gradient(cell, x, layout, normal)


def _content(cell: Cell, x: Shape, layout: int, normal: Any) -> tuple[Tensor, Tensor, Tensor]:
    """q ``[B, H, S, D]``, k and v ``[B, H_kv, T, D]``, in one of the layouts of ROWS."""
    heads = x.H_kv * cell.G
    widths = ((heads, x.S, cell.D), (x.H_kv, x.T, cell.D), (x.H_kv, x.T, cell.D_v))
    if layout % 3 == 0 and layout != UNALIGNED:
        q, k, v = (normal(x.B, length, n, dim).transpose(1, 2) for n, length, dim in widths)
        return q, k, v
    if layout == UNALIGNED:
        q, k, v = (normal(x.B, length, n, dim + 1).transpose(1, 2)[..., 1:] for n, length, dim in widths)
        return q, k, v
    if layout % 3 == 1 or x.S != x.T:
        q = normal(x.B, heads, x.S, cell.D)
        k, v = (normal(x.B, n, length + 5, dim)[:, :, :length] for n, length, dim in widths[1:])
        return q, k, v
    fused = normal(x.B, x.S, sum(n * dim for n, _, dim in widths))
    parts = fused.split([n * dim for n, _, dim in widths], -1)
    q, k, v = (part.unflatten(-1, (n, dim)).transpose(1, 2) for part, (n, _, dim) in zip(parts, widths, strict=True))
    return q, k, v


def _output_gradient(cell: Cell, x: Shape, layout: int, normal: Any) -> Tensor:
    """``[B, H, S, D_v]``; of a sum, it is one number expanded."""
    heads, width = x.H_kv * cell.G, cell.D_v
    if layout % 3 == 1:
        return normal(1).expand(x.B, heads, x.S, width)
    return normal(x.B, x.S, heads, width).transpose(1, 2)


def _options(cell: Cell, x: Shape, layout: int, normal: Any, generator: torch.Generator) -> dict[str, Any]:
    """The arguments beside the five tensors; most on the processor, as they are moved later."""
    has, heads = set(cell.features), x.H_kv * cell.G
    found: dict[str, Any] = {"causal": "causal" in has, "bias_grad": "bias-grad" in has}
    column = torch.arange(x.T)
    if "padding" in has:
        # The first sample has one token, the last one all; one sample alone has half, or its gradients would be 0.
        kept = torch.linspace(1 if x.B > 1 else x.T // 2, x.T, x.B).long()[:, None]
        found["key_padding_mask"] = (column if layout % 2 else column.flip(0)) < kept
    if "segments" in has:
        found["segment_ids"] = column // (torch.arange(x.B)[:, None] * 3 + max(2, x.T // 4))
    if "window" in has:
        found["window"] = max(2, x.T // 3)
    if "softcap" in has:
        found["softcap"] = 2.0
    if "sinks" in has:
        found["sinks"] = normal(heads, dtype=torch.float32 if "sinks-dtype" in has else DTYPES[cell.dtype])
    if "bias" in has:
        bias = normal(heads, x.S, x.T) if layout % 2 else normal(x.B, 1, 1, x.T)
        hidden = torch.rand(bias.shape[-2:], generator=generator) < 1 / 16
        lowest = float("-inf") if bias.dtype == torch.float16 else torch.finfo(bias.dtype).min
        bias = bias.masked_fill(hidden.to(bias.device), lowest)
        found["bias"] = bias.float() if "bias-dtype" in has else bias
    if "bool-bias" in has:
        found["bias"] = torch.rand(x.B, 1, x.S, x.T, generator=generator) > 0.3
    if "bank" in has or "bank-by-token" in has:
        size = (x.B, x.S) if "bank-by-token" in has else (x.B,)
        found["prefix_ids"] = torch.randint(-1, PREFIXES, size, generator=generator)
    if "ragged" in has or "packed" in has:
        found["prefix_lens"] = torch.tensor([x.P, 0, max(1, x.P // 2)])
    if "q_start" in has:
        found["q_start"] = (x.T - x.S) // 2
    if "q_start-tensor" in has:
        most = max(1, x.T - x.S + 1)
        found["q_start"] = torch.randint(0, most, (x.B,) if layout % 2 == 0 else (), generator=generator)
    return found
