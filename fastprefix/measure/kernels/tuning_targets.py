"""The calls that ``--tune`` times: each runs some of the Triton kernels on the inputs of a problem."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from fastprefix.backends import triton
from fastprefix.measure.kernels.kernel_calls import ALL, KERNEL_CALLS, content
from fastprefix.measure.operator.problem import Leaves, Problem
from fastprefix.types import AttentionArgs, Needs

# The largest sizes at which results are compared with the reference in fp64.
CHECKED = {"B": 3, "S": 321, "T": 321, "P": 130}
SHORT_PREFIX = 16
CONTENT = Needs(True, True, True, False, False)

Results = dict[str, Tensor]


@dataclass(frozen=True)
class TuningTarget:
    """A problem, and which of the backend's implementations runs it: fused, epilogue or decode."""

    name: Literal["fused", "epilogue", "decode"]
    problem: Problem

    def is_refused(self, x: Leaves) -> bool:
        """Whether this implementation does not support such inputs."""
        return bool(KERNEL_CALLS["epilogue_bwd" if self.name == "epilogue" else "fwd"].refuses(_args(x)))

    def __call__(self, x: Leaves) -> Results:
        """``o``, ``lse`` and, except in decoding, the five gradients."""
        args = _args(x)
        match self.name:
            case "decode":
                return _decode(args)
            case "epilogue":
                return _epilogue(args, x.do)
        return _fused(args, x.do)

    def reduced(self) -> TuningTarget:
        """The same kernels on a problem small enough to check, with sizes that are no multiples of any tile."""
        sizes = {name: min(getattr(self.problem, name), most) for name, most in CHECKED.items()}
        return replace(self, problem=replace(self.problem, **sizes))

    def meta_leaves(self) -> Leaves:
        """Inputs on the meta device, which suffice to record the launches."""
        x = self.problem
        shapes = ((x.H, x.S), (x.H_kv, x.T), (x.H_kv, x.T), (x.H, x.S))
        q, k, v, do = (content(x.B, heads, length, x.D, x.dtype) for heads, length in shapes)
        prefix = torch.empty(x.H_kv, x.P, x.D, dtype=x.dtype, device="meta")
        return Leaves(q, k, v, prefix, prefix, do)


def tuning_targets(problem: Problem) -> list[TuningTarget]:
    """The targets of a problem: decode; or fused, and epilogue with a prefix cut short."""
    if problem.S < problem.T:
        return [TuningTarget("decode", problem)]
    short = replace(problem, P=min(problem.P, SHORT_PREFIX))
    return [TuningTarget("fused", problem), TuningTarget("epilogue", short)]


def _args(x: Leaves) -> AttentionArgs:
    q, k, v, prefix_k, prefix_v = (t.detach() for t in x.inputs.values())
    return AttentionArgs(q, k, v, prefix_k, prefix_v, scale=q.shape[3] ** -0.5)


def _decode(args: AttentionArgs) -> Results:
    from fastprefix.backends.launch import split_kv_decode

    return _named(*split_kv_decode.fwd(args), ())


def _fused(args: AttentionArgs, do: Tensor) -> Results:
    from fastprefix.backends.launch import forward

    o, lse = forward.fused(args)
    return _named(o, lse, triton.bwd(args, o, lse, do, ALL)[:5])


def _epilogue(args: AttentionArgs, do: Tensor) -> Results:
    """Attention over the content first; then the epilogue merges the prefix into that result."""
    from fastprefix.backends.launch import epilogue, forward

    alone = replace(args, prefix_k=args.prefix_k[:, :0], prefix_v=args.prefix_v[:, :0])
    o, lse = epilogue.fwd(args, *forward.fused(alone))
    dq, dk, dv, *_ = triton.bwd(alone, o, lse, do, CONTENT)
    dq, dprefix_k, dprefix_v = epilogue.bwd(args, o, lse, do, dq, ALL)
    return _named(o, lse, (dq, dk, dv, dprefix_k, dprefix_v))


def _named(o: Tensor, lse: Tensor, grads: Sequence[Tensor | None]) -> Results:
    found = zip(("dq", "dk", "dv", "dprefix_k", "dprefix_v"), grads, strict=False)
    return {"o": o, "lse": lse, **{name: grad for name, grad in found if grad is not None}}
