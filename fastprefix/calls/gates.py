"""A prefix that is added through a gate: two softmaxes, ``o = o_content + gate * o_prefix`` (LLaMA-Adapter).

What the gate is applied to, ``o_prefix [B, H, S, D_v]``, is not kept for the backward pass, which computes it again
from the queries and the prefix: both are kept anyway, the queries for the content and the prefix as a parameter. So a
gated call keeps as many bytes for each sample as one without a gate.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import ops
from .._ops import ops as namespace
from ..ops import NEEDED, TENSORS
from ..types import AttentionArgs
from . import transforms


def attend(args: AttentionArgs, gate: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """Both softmaxes of a call, added through the gate ``[H]`` or ``[B, H]``; the log-sum-exp is the content's."""
    # Detached: a prefix that trains is no reason to keep anything of content that does not.
    no_prefix_k, no_prefix_v = (x.detach()[..., :0, :] for x in (args.prefix_k, args.prefix_v))
    content = replace(
        args, prefix_k=no_prefix_k, prefix_v=no_prefix_v, prefix_bias=None, prefix_ids=None, prefix_lens=None
    )
    if args.prefix_k.dim() == 4:
        content = replace(content, prefix_k=no_prefix_k[0], prefix_v=no_prefix_v[0])
    o_content, lse = transforms.call(content, backend)
    return add(o_content, args, gate, backend), lse


def add(o_content: Tensor, args: AttentionArgs, gate: Tensor, backend: str) -> Tensor:
    """``o_content [B, H, S, D_v]`` plus the gate times attention over the prefix of a call alone."""
    prefix = replace(
        args,
        k=_no_tokens(args.k),
        v=_no_tokens(args.v),
        causal=False,
        key_padding_mask=None,
        segment_ids=None,
        q_start=None,
        window=None,
        sinks=None,
        bias=None,
        bias_grad=False,
    )
    trained = (args.q, args.prefix_k, args.prefix_v, args.prefix_bias, gate)
    is_trained = any(x is not None and x.requires_grad for x in trained)
    if transforms.active() or not torch.is_grad_enabled() or not is_trained:
        o_prefix, _ = transforms.call(prefix, backend)
        return torch.addcmul(o_content, _of_heads(gate, o_prefix.dtype), o_prefix)
    inputs = ops.to_op_inputs(prefix, backend)
    with transforms.undisturbed():
        if not torch.compiler.is_compiling():
            ops.check_backward(inputs)
        return _Gated.apply(o_content, gate, *inputs)


def _no_tokens(x: Tensor) -> Tensor:
    """``[B, H_kv, 0, D]``, no view, which would keep all of ``x`` in memory."""
    return x.new_empty(x.shape[0], x.shape[1], 0, x.shape[3])


def _of_heads(gate: Tensor, dtype: torch.dtype) -> Tensor:
    """The gate ``[H]`` or ``[B, H]`` as a factor of outputs ``[B, H, S, D_v]``."""
    return gate.to(dtype)[..., None, None]


class _Gated(torch.autograd.Function):
    """``o_content + gate * prefix_attn_fwd(*inputs)``, which keeps the inputs and no output."""

    @staticmethod
    def forward(ctx: Any, o_content: Tensor, gate: Tensor, *inputs: Any) -> Tensor:
        o_prefix, _ = namespace.prefix_attn_fwd(*inputs)
        ctx.save_for_backward(gate, *inputs[:TENSORS])
        ctx.scalars = inputs[TENSORS:]
        return torch.addcmul(o_content, _of_heads(gate, o_prefix.dtype), o_prefix)

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        gate, *tensors = ctx.saved_tensors
        inputs = (*tensors, *ctx.scalars)
        o_prefix, lse = namespace.prefix_attn_fwd(*inputs)
        dgate = None
        if ctx.needs_input_grad[1]:
            over = (2, 3) if gate.dim() == 2 else (0, 2, 3)
            dgate = (do * o_prefix).sum(over, dtype=lse.dtype).to(gate.dtype)
        grads: list[Tensor | None] = [None] * len(inputs)
        needs = [bool(ctx.needs_input_grad[2 + i]) for i in NEEDED]
        if any(needs):
            do_prefix = _of_heads(gate, do.dtype) * do
            found = namespace.prefix_attn_bwd(*inputs, o_prefix, lse, do_prefix, needs)
            for i, grad in zip([i for i, need in zip(NEEDED, needs, strict=True) if need], found, strict=True):
                grads[i] = grad
        return do if ctx.needs_input_grad[0] else None, dgate, *grads
