"""Lists the kernels that real calls compile on an sm_90 device and that no check of their cells compiles.

Run without Triton's interpreter, in which a kernel has no variants: ``python -m tests.verification.compiled_variants``.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch

from fastprefix.backends import triton
from fastprefix.measure.kernels.launch_recording import recorded_launches
from fastprefix.types import AttentionArgs
from fastprefix.verification.cells import TILES, Cell, Direction
from fastprefix.verification.checks.calls import calls
from fastprefix.verification.checks.check import NEEDS

DEVICE = (90, "NVIDIA H100 80GB HBM3")
PREFIXES = (1, 16, 20, 32, 64, 100, 128, 700)
WAYS: tuple[tuple[Direction, str], ...] = (
    ("forward", "fused"),
    ("backward", "fused"),
    ("decode", "fused"),
    ("decode", "split"),
)


def launched(args: AttentionArgs, direction: Direction, route: str) -> set[tuple[object, ...]]:
    """What a call compiles."""
    with recorded_launches(*DEVICE) as found:
        if direction == "backward":
            o = torch.empty_like(args.q)
            lse = torch.empty(args.q.shape[:3], device=args.q.device)
            for needs in NEEDS:
                triton.bwd(args, o, lse, o, needs, route)
        else:
            triton.fwd(args, route)
    return {launch.fingerprint for launch in found}


def real_calls(direction: Direction, G: int, D: int) -> Iterator[AttentionArgs]:
    """Calls that models make: whole batches in training, one and several tokens with a cache."""
    place = {"dtype": torch.bfloat16, "device": "meta"}
    if direction == "decode":
        shapes = itertools.product((1, 2, 4, 8, 16, 32, 64), (2, 8, 16), (1, 4, 8, 16), (40, 600), PREFIXES)
    else:
        shapes = itertools.product((1, 8), (2, 8, 16), (17, 64, 500), (0,), PREFIXES)
    for B, H_kv, S, T, P in shapes:
        q = torch.empty(B, S, H_kv * G, D, **place).transpose(1, 2)  # type: ignore[call-overload]
        if T:
            k = torch.empty(B, H_kv, T + 8, D, **place)[:, :, :T]  # type: ignore[call-overload]
        else:
            k = torch.empty(B, S, H_kv, D, **place).transpose(1, 2)  # type: ignore[call-overload]
        prefix = torch.empty(H_kv, P, D, **place)  # type: ignore[call-overload]
        yield AttentionArgs(q, k, k, prefix, prefix, scale=D**-0.5)


def main() -> None:
    """Print a line for each kernel that no check compiles."""
    for G, D, (direction, route) in itertools.product((1, 4, 8), (64, 128), WAYS):
        checked: set[tuple[object, ...]] = set()
        for tile in TILES[2:]:
            cell = Cell(direction, "bf16", D, D, G, tile, ("causal",))
            for _, args, _ in calls(cell, torch.device("cpu")):
                checked |= launched(args, direction, route)
        missed = set().union(*(launched(args, direction, route) for args in real_calls(direction, G, D))) - checked
        for fingerprint in missed:
            print(f"{fingerprint[0]} of {direction} {route} G{G} D{D}: {fingerprint}")


if __name__ == "__main__":
    main()
