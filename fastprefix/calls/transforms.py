"""Calls of the operator in the form that the moment takes: plain, or under ``torch.func``'s transforms.

Transforms have a Function of their own, as its way through torch would cost an ordinary call time. What it computes is
the operator's; second derivatives and forward mode are refused here as they are there.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from .. import ops
from .._ops import ops as namespace
from ..ops import NEEDED, TENSORS
from ..types import AttentionArgs
from ..verification import first_use


def call(args: AttentionArgs, backend: str) -> tuple[Tensor, Tensor]:
    """``o`` and ``lse`` of a checked call."""
    if not torch.compiler.is_compiling() and ops.needs_no_operator(args):
        return ops.forward(args, backend)
    with undisturbed():
        return (Transformed.apply if active() else ops.prefix_attn_fwd)(*ops.to_op_inputs(args, backend))


def undisturbed() -> AbstractContextManager[None]:
    """A block in which backends are not verified, where something watches every operator that runs."""
    return first_use.held() if first_use.is_traced() else nullcontext()


def active() -> bool:
    """Whether a transform is at work."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def one_by_one(op: Any, info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> Any:
    """What ``vmap`` makes of an operator: a call for each, as a batch of batches is no argument of it."""
    calls = [
        op(*(x.select(dim, i) if isinstance(dim, int) else x for x, dim in zip(inputs, in_dims, strict=True)))
        for i in range(info.batch_size)
    ]
    outputs = [torch.stack(found) for found in zip(*calls, strict=True)]
    return (tuple(outputs), (0,) * len(outputs)) if isinstance(calls[0], tuple) else (outputs, [0] * len(outputs))


class Transformed(torch.autograd.Function):
    """``prefix_attn_fwd``, differentiable once."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor]:
        """The operator."""
        return namespace.prefix_attn_fwd(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        """Keep the inputs and outputs that the backward pass reads."""
        if any(ctx.needs_input_grad):
            ops.check_backward(inputs)
        ctx.save_for_backward(*inputs[:TENSORS], *output)
        ctx.scalars = inputs[TENSORS:]
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, do: Tensor, dlse: Any) -> tuple[Tensor | None, ...]:
        """The operator's."""
        grads: list[Tensor | None] = [None] * (TENSORS + len(ctx.scalars))
        needed = [i for i in NEEDED if ctx.needs_input_grad[i]]
        if needed:
            needs = [i in needed for i in NEEDED]
            found = Once.apply(needs, *ctx.saved_tensors, do, *ctx.scalars)
            for i, grad in zip(needed, found, strict=True):
                grads[i] = grad
        return tuple(grads)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        """None."""
        raise RuntimeError("fastprefix: prefix_attention has no forward-mode derivative")


class Once(torch.autograd.Function):
    """``prefix_attn_bwd``, which has no derivative."""

    generate_vmap_rule = True

    @staticmethod
    def forward(needs: list[bool], *values: Any) -> tuple[Tensor, ...]:
        """The operator."""
        *inputs, o, lse, do = values[: TENSORS + 3]
        return tuple(namespace.prefix_attn_bwd(*inputs, *values[TENSORS + 3 :], o, lse, do, needs))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Nothing."""

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """None."""
        raise RuntimeError("fastprefix: prefix_attention has no second derivative (double backward is not offered)")

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        """None."""
        raise RuntimeError("fastprefix: prefix_attention has no forward-mode derivative of its gradient")


for _op in (namespace.prefix_attn_fwd.default, namespace.prefix_attn_bwd.default):
    torch.library.register_vmap(_op.name(), functools.partial(one_by_one, _op), lib=ops.library)
