"""Times the routes of a bucket in turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ... import reference
from ...machine import device
from ...machine.device_errors import describe_error, is_out_of_memory, recover
from ...machine.timing import interleaved
from ...types import DTYPES, AttentionArgs, Needs, lse_dtype
from ..routes import Candidate, candidate
from ..table import Bucket, Result
from .calls import PREFIXES
from .error_rule import ALL

LOWEST = Needs(False, False, False, True, True)
FEWEST, MOST = 3, 21  # rounds
ROUNDS_FOR = 0.12  # seconds
# A route so much slower than the fastest is not timed again: its first call says enough.
HOPELESS = 8.0
# How much two right results may differ because they sum in other orders, relative to the largest entry.
MAY_DIFFER = {torch.float64: 1e-10, torch.float32: 2e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}


def time_routes(
    bucket: Bucket, routes: Sequence[str], place: torch.device, beat: Callable[[str], None]
) -> tuple[dict[str, float], dict[str, tuple[Result, str]]]:
    """Median seconds of each route that takes the bucket's call, and what became of those that are not right.

    Args:
        beat: called with a route's name before it runs for the first time, and with none before they run in turns.

    Raises:
        DeviceLostError: the device does not respond in this process any more.
    """
    args, do = _call(bucket, place)
    beat("reference")
    state, want = _reference(bucket, args, do)
    ready: dict[str, Callable[[], Any]] = {}
    once: dict[str, float] = {}
    bad: dict[str, tuple[Result, str]] = {}
    for route in routes:
        beat(route)
        chosen = candidate(route)
        try:
            if chosen.module.unsupported(args, chosen.route):
                continue
            run = _run(chosen, bucket, args, *state, do)
            got = run()  # compiles
            device.synchronize(place)
            if want is not None and (reason := _difference(got, want, args.q.dtype)):
                bad[route] = ("wrong", reason)
                continue
            start = time.perf_counter()
            run()
            device.synchronize(place)
            once[route], ready[route] = time.perf_counter() - start, run
        except Exception as error:
            recover(place, route, describe_error(error))
            if not is_out_of_memory(error):
                bad[route] = ("failed", describe_error(error))
    if not ready:
        return {}, bad
    best = min(once.values())
    close = {route: run for route, run in ready.items() if once[route] <= HOPELESS * best}
    rounds = int(ROUNDS_FOR / sum(once[route] for route in close))
    beat("")
    timings = interleaved(close, min(MOST, max(FEWEST, rounds)), 0, place)
    return {**once, **{route: timing.median for route, timing in timings.items()}}, bad


def _reference(
    bucket: Bucket, args: AttentionArgs, do: Tensor
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor | None, ...] | None]:
    """``o`` and ``lse``, and what the bucket's call gives; None where the dense reference has no room for it."""
    try:
        state = reference.fwd(args)
        return state, state if bucket.mode in ("forward", "decode") else reference.bwd(args, *state, do, _needs(bucket))
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        device.empty_cache(args.q.device)
        return (
            torch.zeros_like(do),
            torch.zeros(args.q.shape[:3], dtype=lse_dtype(args.q.dtype), device=do.device),
        ), None


def _difference(got: Sequence[Tensor | None], want: Sequence[Tensor | None], dtype: torch.dtype) -> str | None:
    """What differs by more than two right results of a dtype may, as they sum in other orders; None when nothing."""
    for x, y in zip(got, want, strict=False):
        if x is None or y is None:
            continue
        scale = max(1e-3, y.abs().max().item())
        error = (x.float() - y.float()).abs().max().item()
        if not error <= MAY_DIFFER[dtype] * scale:  # so written that nan fails
            return f"error {error:.2e} where the largest entry is {scale:.2e}"
    return None


def _needs(bucket: Bucket) -> Needs:
    return LOWEST if bucket.mode == "lowest" else ALL


def _run(
    chosen: Candidate, bucket: Bucket, args: AttentionArgs, o: Tensor, lse: Tensor, do: Tensor
) -> Callable[[], Any]:
    if bucket.mode in ("forward", "decode"):
        return lambda: chosen.module.fwd(args, chosen.route)
    needs = _needs(bucket)
    return lambda: chosen.module.bwd(args, o, lse, do, needs, chosen.route)


def _call(x: Bucket, place: torch.device) -> tuple[AttentionArgs, Tensor]:
    dtype = DTYPES[x.dtype]

    def content(heads: int, length: int) -> Tensor:
        return torch.randn(x.B, length, heads, x.D, device=place, dtype=dtype).transpose(1, 2)

    bank = (PREFIXES,) if x.variant == "bank" else ()
    prefix_k, prefix_v = (torch.randn(*bank, x.H_kv, x.P, x.D, device=place, dtype=dtype) for _ in range(2))
    q, k, v, do = content(x.H, x.S), content(x.H_kv, x.T), content(x.H_kv, x.T), content(x.H, x.S)
    mask = ids = None
    if bank:
        ids = torch.arange(x.B, device=place) % PREFIXES
    if x.variant == "masked":
        mask = torch.arange(x.T, device=place) >= torch.linspace(0, x.T // 2, x.B, device=place).long()[:, None]
    return AttentionArgs(q, k, v, prefix_k, prefix_v, scale=x.D**-0.5, key_padding_mask=mask, prefix_ids=ids), do
