"""Which kernels Triton compiles for the plan: every row is called on meta tensors, and its launches are looked at."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benches import correctness, equality, step
from benches.arguments import CALLS
from benches.plan import Check, Equal, Job, Time, Train
from fastprefix.backends import aten, triton
from fastprefix.measure import Mode, Problem
from fastprefix.measure.device_errors import describe_error
from fastprefix.measure.kernels.launch_recording import Launch, recorded_launches
from fastprefix.measure.operator.problem import INPUTS, TRAINED
from fastprefix.types import BACKENDS, AttentionArgs, Needs

# What a model's layers call: all but the lowest, the lowest, and with padding.
STEPS: tuple[tuple[Mode, bool], ...] = (("backward", False), ("lowest", False), ("backward", True))
Device = tuple[int, str]  # compute capability and name


class Source(NamedTuple):
    """A call that launches kernels: ``needs`` None for a forward alone. Plain data, for other processes.

    ``padded``: with a mask; ``master``: the prefix in fp32, as models hold it; ``beside``: not the Triton backend's
    call, but what the aten backend leaves of it to our kernels.
    """

    problem: Problem
    needs: Needs | None
    argument: str | None = None  # the call of arguments.py that the problem is of
    padded: bool = False
    master: bool = False
    beside: bool = False


def sources(plan: Iterable[Job]) -> list[Source]:
    """Every call of ours in the plan that launches kernels, once, in the plan's order."""
    return list(dict.fromkeys(source for job in plan for source in _sources(job)))


def _sources(job: Job) -> Iterator[Source]:
    own = (job.backend,) if isinstance(job, Check | Equal) else BACKENDS
    for source in _calls(job):
        if "triton" in own:
            yield source
        if "aten" in own and _short(source):
            yield source._replace(beside=True, padded=False)


def _calls(job: Job) -> Iterator[Source]:
    match job:
        case Check() | Equal():
            yield from _correctness(job)
        case Time():
            yield Source(replace(job.problem, device="cpu"), _needs(TRAINED[job.mode]))
        case Train():
            x = step.problem(job, "cpu")
            yield from (Source(x, _needs(TRAINED[mode]), master=True) for mode, padded in STEPS if not padded)


def _correctness(job: Check | Equal) -> Iterator[Source]:
    if isinstance(job, Check):
        for name, call in correctness.calls(job.what, job.dtype, job.compiled, "cpu", smoke=False):
            yield Source(call.problem, _needs(INPUTS), name if job.what == "arguments" else None)
        return
    for x in equality.problems(job.model, job.dtype, "cpu", smoke=False):
        modes = STEPS if x.S > 1 else (("decode", False),)
        yield from (Source(x, _needs(TRAINED[mode]), padded=padded, master=True) for mode, padded in modes)


def _short(source: Source) -> bool:
    """Whether the aten backend may leave the prefix to our kernels on CUDA."""
    return 0 < source.problem.P <= aten.SHORT and source.problem.dtype.itemsize == 2


def _needs(names: Sequence[str]) -> Needs | None:
    return Needs(*(name in names for name in INPUTS)) if names else None


def launches(source: Source, device: Device) -> list[Launch]:
    """Every launch of a call on such a device.

    Raises:
        ValueError: no tile table has a row for the call.
    """
    args = _args(source)
    with recorded_launches(*device) as found:
        if args is not None and source.beside:
            _epilogue(args, source.needs)
        elif args is not None:
            o, lse = triton.fwd(args)
            if source.needs is not None:
                triton.bwd(args, o, lse, torch.empty_like(o), source.needs)
    return found


def _epilogue(args: AttentionArgs, needs: Needs | None) -> None:
    from fastprefix.backends.launch import epilogue
    from fastprefix.backends.launch.shapes import token_major

    if not epilogue.reasons(args):
        o, lse = token_major(args.q, args.v.shape[3]), args.q.new_empty(args.q.shape[:3], dtype=torch.float32)
        epilogue.fwd(args, o, lse)
        if needs is not None and not epilogue.bwd_reasons(args):
            epilogue.bwd(args, o, lse, torch.empty_like(o), token_major(args.q) if needs.q else None, needs)


def distinct(calls: Iterable[Source], device: Device) -> tuple[list[tuple[Source, int]], list[str]]:
    """The kernels that these calls compile: one call each, and the number of its launch; and what cannot be called."""
    found: dict[object, tuple[Source, int]] = {}
    reasons = []
    for source in calls:
        try:
            for index, launch in enumerate(launches(source, device)):
                found.setdefault(launch.fingerprint, (source, index))
        except Exception as error:
            reasons.append(f"{source.problem.label}: {describe_error(error)}")
    return list(found.values()), reasons


def _args(source: Source) -> AttentionArgs | None:
    """The call on meta tensors; None for a gate, which makes two calls of one."""
    x = source.problem
    inputs: dict[str, Any] = _blank(x, torch.float32 if source.master else x.dtype)
    options: dict[str, Any] = {}
    if source.argument is not None:
        leaves, given = replace(CALLS[source.argument], problem=x).build()
        inputs, options = ({name: _meta(value) for name, value in found.items()} for found in (leaves.inputs, given))
    if "gate" in options:
        return None
    if source.padded:
        options["key_padding_mask"] = torch.empty(x.B, x.T, dtype=torch.bool, device="meta")
    return AttentionArgs(**{"causal": x.causal, "scale": x.D**-0.5, **inputs, **options})


def _blank(x: Problem, prefix: torch.dtype) -> dict[str, Tensor]:
    """Inputs without numbers, content as models hold it."""

    def content(heads: int, length: int) -> Tensor:
        return torch.empty(x.B, length, heads, x.D, dtype=x.dtype, device="meta").transpose(1, 2)

    inputs = [content(x.H, x.S), content(x.H_kv, x.T), content(x.H_kv, x.T)]
    inputs += [torch.empty(x.H_kv, x.P, x.D, dtype=prefix, device="meta") for _ in range(2)]
    return dict(zip(INPUTS, inputs, strict=True))


def _meta(x: Any) -> Any:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta") if isinstance(x, Tensor) else x
