"""What is verified: every cell and bucket of a device, or those that some calls need; the most used first."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from ..types import AttentionArgs, Mode
from .cells import ANY, DIRECTIONS, DTYPE_NAMES, FEATURES, LARGEST_TILE, Cell, Direction, cell_of
from .table import VARIANTS, Bucket, Variant

# What is checked at every head dim: causal models, bidirectional ones, and models in half precision.
PLAIN = (("causal",), (), ("causal", "prefix-dtype"), ("causal", "padding"))
# And at the most common ones: each argument by itself, and all together that a backend may take.
ALONE = (
    ("padding",),
    ("causal", "padding", "prefix-dtype"),
    ("causal", "segments"),
    ("causal", "window"),
    ("causal", "softcap"),
    ("causal", "sinks"),
    ("causal", "sinks", "sinks-dtype"),
    ("causal", "bias"),
    ("causal", "bias", "bias-dtype"),
    ("bool-bias",),
    ("causal", "bank"),
    ("causal", "bank", "ragged"),
    ("causal", "bank", "packed"),
    ("causal", "bank-by-token", "ragged"),
    ("causal", "prefix-bias"),
    ("causal", "bank", "ragged", "prefix-bias"),
    ("causal", "q_start"),
    ("causal", "q_start-tensor"),
    ("causal", "window", "sinks"),
    ("causal", "sinks", "bank", "ragged", "prefix-dtype"),
    ("causal", "padding", "segments", "window", "sinks", "bias", "bank", "ragged", "prefix-dtype"),
    ("causal", "padding", "segments", "window", "softcap", "sinks", "bias", "bank", "ragged", "prefix-dtype"),
    ("causal", "padding", "segments", "window", "sinks", "bank", "ragged", "prefix-dtype", "prefix-bias"),
)
COMMON = ((64, 64), (128, 128))
OTHER = ((96, 96), (80, 80), (256, 256), (32, 32), (192, 128))
GROUPED = 4  # query heads of a key/value head
PREFIXES, BATCHES, CACHED, LONG = (16, 128, 1024), (1, 8, 32), 512, 8192


def cells(device_type: str) -> list[Cell]:
    """Every cell of a device, in the order in which they are checked."""
    if device_type == "cpu":
        dtypes, tile = ("fp32", "bf16", "fp16", "fp64"), ANY
        found = [*_cells(dtypes[:2], COMMON, GROUPED, tile, PLAIN), *_cells(dtypes[:1], COMMON, 1, tile, PLAIN)]
        found += _cells(dtypes[:1], COMMON, GROUPED, tile, ALONE)
        found += _cells(dtypes[1:2], COMMON[:1], GROUPED, tile, ALONE)
        found += _cells(dtypes[:2], OTHER, GROUPED, tile, PLAIN[:1])
        return list(dict.fromkeys([*found, *_cells(dtypes[2:], COMMON[:1], GROUPED, tile, PLAIN[:2])]))
    # On a GPU most of the time is the compiler's. What the budget does not reach is verified when a model needs it.
    bf16, small, large = ("bf16",), 16, LARGEST_TILE
    found = [*_cells(bf16, COMMON, GROUPED, small, PLAIN), *_cells(bf16, COMMON, GROUPED, large, PLAIN[:1])]
    found += [*_cells(bf16, COMMON, 1, small, PLAIN[:1]), *_cells(("fp16",), COMMON, GROUPED, small, PLAIN[:1])]
    found += _cells(bf16, COMMON[1:], GROUPED, small, ALONE)
    found += _cells(("fp32",), COMMON[:1], GROUPED, small, PLAIN[:1])
    found += [*_cells(bf16, OTHER, GROUPED, small, PLAIN[:1]), *_cells(bf16, COMMON, GROUPED, large, PLAIN)]
    found += [*_cells(bf16, COMMON, 1, small, PLAIN), *_cells(bf16, COMMON[:1], GROUPED, small, ALONE)]
    return list(dict.fromkeys([*found, *_cells(("fp16", "fp32"), COMMON, GROUPED, small, PLAIN)]))


def _cells(
    dtypes: Sequence[str],
    dims: Sequence[tuple[int, int]],
    groups: int,
    tile: int,
    features: Sequence[tuple[str, ...]],
) -> Iterator[Cell]:
    for dtype in dtypes:
        for D, D_v in dims:
            for own in features:
                if dtype in ("fp32", "fp64"):  # parameters are fp32 at least
                    own = tuple(name for name in own if not name.endswith("-dtype"))
                yield from (Cell(direction, dtype, D, D_v, groups, tile, own) for direction in DIRECTIONS)


def buckets(device_type: str) -> list[Bucket]:
    """Every bucket of a device: training by S and P, the lowest layer, decoding by B and P; masked, and with a bank."""
    if device_type == "cpu":
        dtype, heads, dims = "fp32", (8, 2), [64]
    else:
        dtype, heads, dims = "bf16", (32, 8), [64, 128]
    rows, lengths = _sizes(device_type)
    found: list[Bucket] = []
    for D in dims:
        for P in PREFIXES:
            for S in lengths:
                found += _train(dtype, D, heads, max(1, rows // S), S, P)
            found += [Bucket("decode", dtype, D, "plain", B, *heads, 1, CACHED, P) for B in BATCHES]
        middle = PREFIXES[1]
        found += [Bucket("decode", dtype, D, "plain", B, *heads, 1, LONG, middle) for B in BATCHES[:2]]
        for variant in VARIANTS[1:]:
            for S in lengths:
                found += list(_train(dtype, D, heads, max(2, rows // S), S, middle, variant))[:2]
            found += [Bucket("decode", dtype, D, variant, B, *heads, 1, CACHED, middle) for B in BATCHES[1:]]
    return found


def _sizes(device_type: str) -> tuple[int, tuple[int, ...]]:
    """Rows of a timed batch in training, and the lengths of its samples."""
    return (512, (64, 512)) if device_type == "cpu" else (4096, (512, 2048))


def _train(
    dtype: str, D: int, heads: tuple[int, int], B: int, S: int, P: int, variant: Variant = "plain"
) -> Iterator[Bucket]:
    modes: tuple[Mode, ...] = ("forward", "backward", "lowest")
    yield from (Bucket(mode, dtype, D, variant, B, *heads, S, S, P) for mode in modes)


def cells_of_call(args: AttentionArgs, direction: Direction) -> list[Cell]:
    """What a forward of these arguments needs, and the backward that may follow it."""
    return [cell_of(args, direction), *([] if args.q.shape[2] == 1 else [cell_of(args, "backward")])]


def cells_of_model(calls: Iterable[AttentionArgs]) -> list[Cell]:
    """What training and generating with a model need whose layers make these calls: with and without padding."""
    found: dict[Cell, None] = {}
    for args in calls:
        for direction in DIRECTIONS:
            cell = cell_of(args, direction)
            plain = set(cell.features) - {"padding", "bool-bias"}
            for own in (set(cell.features), plain, {*plain, "padding"}):
                found[cell._replace(features=tuple(name for name in FEATURES if name in own))] = None
    return list(found)


def buckets_of_calls(calls: Iterable[AttentionArgs], device_type: str) -> list[Bucket]:
    """The buckets nearest to what models with these calls do: their heads and prefix, a few lengths and batches."""
    found: dict[Bucket, None] = {}
    for args in calls:
        H_kv, dtype = args.prefix_k.shape[-3], DTYPE_NAMES[args.q.dtype]
        heads, D, P = (args.q.shape[1], H_kv), max(args.q.shape[3], args.v.shape[3]), args.num_prefix_tokens
        rows, lengths = _sizes(device_type)
        if P == 0 or args.prefix_ids is not None:
            continue
        for S in lengths:
            found.update(dict.fromkeys(_train(dtype, D, heads, max(1, rows // S), S, P)))
        found.update(dict.fromkeys(Bucket("decode", dtype, D, "plain", B, *heads, 1, CACHED, P) for B in BATCHES[:2]))
    return list(found)
