"""What is verified: every cell and bucket of a device, or those that some calls need; the most used first."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from ..types import AttentionArgs
from .cells import DTYPES, Cell, Direction, cell_of
from .table import Bucket, Mode

DIRECTIONS: tuple[Direction, ...] = ("forward", "backward", "decode")

# What is checked at every head dim: a causal model of grouped heads, a bidirectional one, and models in half precision.
PLAIN = (("causal", "gqa"), (), ("causal", "gqa", "prefix-dtype"), ("causal", "gqa", "padding"))
# And at the most common ones: each argument by itself, and all that go together.
ALONE = (
    ("causal",),
    ("gqa", "padding"),
    ("causal", "gqa", "padding", "prefix-dtype"),
    ("causal", "gqa", "segments"),
    ("causal", "gqa", "window"),
    ("causal", "gqa", "softcap"),
    ("causal", "gqa", "sinks"),
    ("causal", "gqa", "bias"),
    ("gqa", "bool-bias"),
    ("causal", "gqa", "bank"),
    ("causal", "gqa", "bank", "ragged"),
    ("causal", "gqa", "bank", "packed"),
    ("causal", "gqa", "bank-by-token", "ragged"),
    ("causal", "gqa", "q_start"),
    ("causal", "gqa", "q_start-tensor"),
    ("causal", "gqa", "window", "sinks"),
    ("causal", "gqa", "padding", "window", "sinks"),
    ("causal", "gqa", "padding", "segments", "window", "softcap", "sinks", "bias", "bank", "ragged", "prefix-dtype"),
)
COMMON = ((64, 64), (128, 128))
PREFIXES, BATCHES, CACHED = (16, 128, 1024), (1, 8, 32), 512
OTHER = ((96, 96), (80, 80), (256, 256), (32, 32), (192, 128))


def cells(device_type: str) -> list[Cell]:
    """Every cell of a device, in the order in which they are checked."""
    dtypes = ("fp32", "bf16", "fp16", "fp64") if device_type == "cpu" else ("bf16", "fp16", "fp32")
    found = [*_cells(dtypes, COMMON, PLAIN), *_cells(dtypes[:1], COMMON, ALONE)]
    return [*found, *_cells(dtypes[1:2], COMMON[:1], ALONE), *_cells(dtypes[:2], OTHER, PLAIN[:2])]


def _cells(
    dtypes: Sequence[str], dims: Sequence[tuple[int, int]], features: Sequence[tuple[str, ...]]
) -> Iterator[Cell]:
    for dtype in dtypes:
        for D, D_v in dims:
            for own in features:
                if "prefix-dtype" in own and dtype in ("fp32", "fp64"):
                    continue  # parameters are fp32 at least
                yield from (Cell(direction, dtype, D, D_v, own) for direction in DIRECTIONS)


def buckets(device_type: str) -> list[Bucket]:
    """Every bucket of a device: training by S and P, the lowest layer, decoding by B and P."""
    if device_type == "cpu":
        dtype, heads, dims = "fp32", (8, 2), [64]
    else:
        dtype, heads, dims = "bf16", (32, 8), [64, 128]
    rows, lengths = _sizes(device_type)
    found: list[Bucket] = []
    for D in dims:
        for P in PREFIXES:
            for S in lengths:
                found += _train(dtype, D, heads, max(1, rows // S), S, P, masked=PREFIXES[1] == P)
            found += [Bucket("decode", dtype, D, False, B, *heads, 1, CACHED, P) for B in BATCHES]
    return found


def _sizes(device_type: str) -> tuple[int, tuple[int, ...]]:
    """Rows of a timed batch in training, and the lengths of its samples."""
    return (512, (64, 512)) if device_type == "cpu" else (8192, (512, 4096))


def _train(dtype: str, D: int, heads: tuple[int, int], B: int, S: int, P: int, masked: bool) -> Iterator[Bucket]:
    modes: tuple[Mode, ...] = ("forward", "backward", "lowest")
    for mode in modes:
        yield Bucket(mode, dtype, D, False, B, *heads, S, S, P)
    if masked:
        yield from (Bucket(mode, dtype, D, True, B, *heads, S, S, P) for mode in modes[:2])


def cells_of_call(args: AttentionArgs, direction: Direction) -> list[Cell]:
    """What a forward of these arguments needs, and the backward that may follow it."""
    return [cell_of(args, direction), *([] if args.q.shape[2] == 1 else [cell_of(args, "backward")])]


def cells_of_model(calls: Iterable[AttentionArgs]) -> list[Cell]:
    """What training and generating with a model need whose layers make these calls: with and without padding."""
    found: dict[Cell, None] = {}
    for args in calls:
        for direction in DIRECTIONS:
            cell = cell_of(args, direction)
            plain = tuple(name for name in cell.features if name not in ("padding", "bool-bias"))
            found.update(dict.fromkeys((cell, cell._replace(features=plain), _padded(cell, plain))))
    return list(found)


def _padded(cell: Cell, plain: tuple[str, ...]) -> Cell:
    place = sum(name in ("causal", "gqa") for name in plain)  # the two that a cell names before padding
    return cell._replace(features=(*plain[:place], "padding", *plain[place:]))


def buckets_of_calls(calls: Iterable[AttentionArgs], device_type: str) -> list[Bucket]:
    """The buckets nearest to what models with these calls do: their heads and prefix, a few lengths and batches."""
    found: dict[Bucket, None] = {}
    for args in calls:
        H_kv, dtype = args.prefix_k.shape[-3], DTYPES[args.q.dtype]
        heads, D, P = (args.q.shape[1], H_kv), max(args.q.shape[3], args.v.shape[3]), args.num_prefix_tokens
        rows, lengths = _sizes(device_type)
        if P == 0 or args.prefix_ids is not None:
            continue
        for S in lengths:
            found.update(dict.fromkeys(_train(dtype, D, heads, max(1, rows // S), S, P, masked=False)))
        found.update(dict.fromkeys(Bucket("decode", dtype, D, False, B, *heads, 1, CACHED, P) for B in BATCHES[:2]))
    return list(found)
