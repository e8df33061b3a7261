"""The kernels that Triton compiles for the plan, found by calling every row on meta tensors and recording launches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benches.device_suite import model_correctness, operator_correctness, training_rows
from benches.device_suite.operator_calls import CALLS
from benches.device_suite.plan import Job, ModelCheck, OperatorCheck, OperatorTiming, TrainingTiming
from fastprefix.backends import aten_routes, triton
from fastprefix.machine.device_errors import describe_error
from fastprefix.measure import Mode, Problem
from fastprefix.measure.kernels.launch_recording import Launch, recorded_launches
from fastprefix.measure.operator.problem import INPUTS, TRAINED
from fastprefix.types import BACKENDS, AttentionArgs, Needs

# The calls of a model's layers: all but the lowest, the lowest, and with padding.
STEPS: tuple[tuple[Mode, bool], ...] = (("backward", False), ("lowest", False), ("backward", True))
Device = tuple[int, str]  # compute capability and name


class MetaCall(NamedTuple):
    """A call that launches kernels, as plain data for other processes.

    Attributes:
        needs: the gradients to compute; None for a forward alone.
        argument: the call in ``operator_calls.CALLS`` that the problem belongs to.
        padded: whether there is a padding mask.
        master: whether the prefix is in fp32, as models hold it.
        epilogue: whether the aten backend makes the call and leaves the prefix to the epilogue kernels.
    """

    problem: Problem
    needs: Needs | None
    argument: str | None = None
    padded: bool = False
    master: bool = False
    epilogue: bool = False


def meta_calls(plan: Iterable[Job]) -> list[MetaCall]:
    """Every call of the plan that launches kernels, each once, in the order of the plan."""
    return list(dict.fromkeys(call for job in plan for call in _meta_calls(job)))


def _meta_calls(job: Job) -> Iterator[MetaCall]:
    own = (job.backend,) if isinstance(job, OperatorCheck | ModelCheck) else BACKENDS
    for call in _calls(job):
        if "triton" in own:
            yield call
        if "aten" in own and _takes_epilogue(call):
            yield call._replace(epilogue=True, padded=False)


def _calls(job: Job) -> Iterator[MetaCall]:
    match job:
        case OperatorCheck() | ModelCheck():
            yield from _correctness(job)
        case OperatorTiming():
            yield MetaCall(replace(job.problem, device="cpu"), _needs(TRAINED[job.mode]))
        case TrainingTiming():
            x = training_rows.layer_problem(job, "cpu")
            yield from (MetaCall(x, _needs(TRAINED[mode]), master=True) for mode, padded in STEPS if not padded)


def _correctness(job: OperatorCheck | ModelCheck) -> Iterator[MetaCall]:
    if isinstance(job, OperatorCheck):
        for name, call in operator_correctness.calls(job.what, job.dtype, job.compiled, "cpu", smoke=False):
            yield MetaCall(call.problem, _needs(INPUTS), name if job.what == "arguments" else None)
        return
    for x in model_correctness.problems(job.model, job.dtype, "cpu", smoke=False):
        modes = STEPS if x.S > 1 else (("decode", False),)
        yield from (MetaCall(x, _needs(TRAINED[mode]), padded=padded, master=True) for mode, padded in modes)


def _takes_epilogue(call: MetaCall) -> bool:
    """Whether the aten backend may leave the prefix to the epilogue kernels on CUDA."""
    return 0 < call.problem.P <= aten_routes.SHORT and call.problem.dtype.itemsize == 2


def _needs(names: Sequence[str]) -> Needs | None:
    return Needs(*(name in names for name in INPUTS)) if names else None


def launches(call: MetaCall, device: Device) -> list[Launch]:
    """Record the launches of a call on such a device.

    Raises:
        ValueError: no tile table has a row for the call.
    """
    args = _args(call)
    with recorded_launches(*device) as found:
        if args is not None and call.epilogue:
            _epilogue(args, call.needs)
        elif args is not None:
            o, lse = triton.fwd(args)
            if call.needs is not None:
                triton.bwd(args, o, lse, torch.empty_like(o), call.needs)
    return found


def _epilogue(args: AttentionArgs, needs: Needs | None) -> None:
    from fastprefix.backends.launch import epilogue
    from fastprefix.backends.launch.kernel_args import empty_bshd

    if not epilogue.reasons(args):
        o, lse = empty_bshd(args.q, args.v.shape[3]), args.q.new_empty(args.q.shape[:3], dtype=torch.float32)
        epilogue.fwd(args, o, lse)
        if needs is not None and not epilogue.bwd_reasons(args):
            epilogue.bwd(args, o, lse, torch.empty_like(o), empty_bshd(args.q) if needs.q else None, needs)


def distinct_kernels(calls: Iterable[MetaCall], device: Device) -> tuple[list[tuple[MetaCall, int]], list[str]]:
    """The kernels that these calls compile, each as a call and the index of its launch; and why calls failed."""
    found: dict[object, tuple[MetaCall, int]] = {}
    reasons = []
    for call in calls:
        try:
            for index, launch in enumerate(launches(call, device)):
                found.setdefault(launch.fingerprint, (call, index))
        except Exception as error:
            reasons.append(f"{call.problem.label}: {describe_error(error)}")
    return list(found.values()), reasons


def _args(call: MetaCall) -> AttentionArgs | None:
    """The arguments of a call on meta tensors; None for a gated one, which the operator splits into two calls."""
    x = call.problem
    inputs: dict[str, Any] = _meta_inputs(x, torch.float32 if call.master else x.dtype)
    options: dict[str, Any] = {}
    if call.argument is not None:
        leaves, given = replace(CALLS[call.argument], problem=x).build()
        inputs, options = ({name: _meta(value) for name, value in found.items()} for found in (leaves.inputs, given))
    if "gate" in options:
        return None
    if call.padded:
        options["key_padding_mask"] = torch.empty(x.B, x.T, dtype=torch.bool, device="meta")
    return AttentionArgs(**{"causal": x.causal, "scale": x.D**-0.5, **inputs, **options})


def _meta_inputs(x: Problem, prefix: torch.dtype) -> dict[str, Tensor]:
    """Inputs on the meta device, content with the strides that models give it."""

    def content(heads: int, length: int) -> Tensor:
        return torch.empty(x.B, length, heads, x.D, dtype=x.dtype, device="meta").transpose(1, 2)

    inputs = [content(x.H, x.S), content(x.H_kv, x.T), content(x.H_kv, x.T)]
    inputs += [torch.empty(x.H_kv, x.P, x.D, dtype=prefix, device="meta") for _ in range(2)]
    return dict(zip(INPUTS, inputs, strict=True))


def _meta(x: Any) -> Any:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta") if isinstance(x, Tensor) else x
