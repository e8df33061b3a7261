"""Times the routes of a bucket in turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ... import reference
from ...machine import device
from ...machine.device_errors import describe_error, recover
from ...machine.timing import interleaved
from ...types import AttentionArgs, Needs
from ..routes import Candidate, candidate
from ..table import Bucket
from .calls import DTYPE
from .error_rule import ALL

LOWEST = Needs(False, False, False, True, True)
FEWEST, MOST = 3, 21  # rounds
ROUNDS_FOR = 0.12  # seconds
# A route so much slower than the fastest is not timed again: its first call says enough.
HOPELESS = 8.0


def time_routes(
    bucket: Bucket, routes: Sequence[str], place: torch.device, beat: Callable[[str], None]
) -> dict[str, float]:
    """Median seconds of each route that takes the bucket's call; the others are left out.

    Args:
        beat: called with a route's name before it runs for the first time.

    Raises:
        DeviceLostError: the device does not respond in this process any more.
    """
    args, do = _call(bucket, place)
    o, lse = reference.fwd(args) if bucket.mode in ("backward", "lowest") else (do, do)
    ready: dict[str, Callable[[], Any]] = {}
    once: dict[str, float] = {}
    for route in routes:
        beat(route)
        chosen = candidate(route)
        try:
            if chosen.module.unsupported(args, chosen.route):
                continue
            run = _run(chosen, bucket, args, o, lse, do)
            run()  # compiles
            device.synchronize(place)
            start = time.perf_counter()
            run()
            device.synchronize(place)
            once[route], ready[route] = time.perf_counter() - start, run
        except Exception as error:
            recover(place, route, describe_error(error))
    if not ready:
        return {}
    best = min(once.values())
    close = {route: run for route, run in ready.items() if once[route] <= HOPELESS * best}
    rounds = int(ROUNDS_FOR / sum(once[route] for route in close))
    timings = interleaved(close, min(MOST, max(FEWEST, rounds)), 0, place)
    return {**once, **{route: timing.median for route, timing in timings.items()}}


def _run(
    chosen: Candidate, bucket: Bucket, args: AttentionArgs, o: torch.Tensor, lse: torch.Tensor, do: torch.Tensor
) -> Callable[[], Any]:
    match bucket.mode:
        case "backward":
            return lambda: chosen.module.bwd(args, o, lse, do, ALL, chosen.route)
        case "lowest":
            return lambda: chosen.module.bwd(args, o, lse, do, LOWEST, chosen.route)
    return lambda: chosen.module.fwd(args, chosen.route)


def _call(x: Bucket, place: torch.device) -> tuple[AttentionArgs, torch.Tensor]:
    dtype = DTYPE[x.dtype]

    def content(heads: int, length: int) -> torch.Tensor:
        return torch.randn(x.B, length, heads, x.D, device=place, dtype=dtype).transpose(1, 2)

    prefix_k, prefix_v = (torch.randn(x.H_kv, x.P, x.D, device=place, dtype=dtype) for _ in range(2))
    q, k, v, do = content(x.H, x.S), content(x.H_kv, x.T), content(x.H_kv, x.T), content(x.H, x.S)
    mask = None
    if x.masked:
        mask = torch.arange(x.T, device=place) >= torch.linspace(0, x.T // 2, x.B, device=place).long()[:, None]
    return AttentionArgs(q, k, v, prefix_k, prefix_v, scale=x.D**-0.5, key_padding_mask=mask), do
