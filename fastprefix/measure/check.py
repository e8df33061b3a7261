"""Is a result right: against fp64 truth, by the error that eager mode has in the same dtype, or a peer's."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fastprefix.functional import prefix_attention
from fastprefix.measure.peers import visible
from fastprefix.measure.problem import Leaves, Problem

# How far two right answers of one dtype lie apart, summed in different orders, in parts of the largest entry.
AGREE = {torch.float64: 1e-10, torch.float32: 2e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}


def disagreement(got: Mapping[str, Tensor], want: Mapping[str, Tensor], dtype: torch.dtype) -> str | None:
    """The first tensor of ``got`` that is not ``want``'s, in words; None when all agree."""
    for name, x in got.items():
        if x.shape != want[name].shape:
            return f"{name} has shape {tuple(x.shape)}, not {tuple(want[name].shape)}"
        if x.numel() == 0:
            continue
        scale = max(1e-3, want[name].abs().max().item())  # 0 may be right, and then not to the last bit
        error = (x.float() - want[name].float()).abs().max().item()
        if not error <= AGREE[dtype] * scale:  # so written that nan fails
            return f"{name} is off by {error:.2e} where the largest entry is {scale:.2e}"
    return None


def truth(problem: Problem, leaves: Leaves) -> dict[str, Tensor]:
    """``o``, ``lse`` and the five gradients by the reference in fp64."""
    return results(leaves.to(torch.float64), causal=problem.causal, backend="reference")


def results(
    leaves: Leaves, *, causal: bool, backend: str, op: Callable[..., tuple[Tensor, Tensor]] | None = None
) -> dict[str, Tensor]:
    """``o``, ``lse`` and the five gradients of the operator, or of a compiled form of it given as ``op``."""
    call = op or prefix_attention
    o, lse = call(**leaves.inputs, causal=causal, return_lse=True, backend=backend)
    return {"o": o.detach(), "lse": lse, **_gradients(o, leaves)}


def eager(problem: Problem, leaves: Leaves) -> dict[str, Tensor]:
    """Concatenate, multiply, softmax, multiply, each step rounded to the leaves' dtype."""
    keys, values = (x.repeat_interleave(problem.groups, 1) for x in leaves.joined())
    scores = leaves.q @ keys.transpose(-1, -2) * problem.D**-0.5
    scores = scores.masked_fill(~visible(problem), float("-inf"))
    o = torch.softmax(scores, -1) @ values
    return {"o": o.detach(), "lse": torch.logsumexp(scores, -1).detach(), **_gradients(o, leaves)}


def broken_rule(problem: Problem, leaves: Leaves, got: Mapping[str, Tensor], tiny: float = 1e-6) -> str | None:
    """flash-attention's rule: ``err(got) <= 2 * err(eager, same dtype) + tiny``, both against fp64 truth.

    Args:
        got: what :func:`results` returns for the same leaves.
        tiny: least error allowed, raised to one rounding of the largest entry; the prefix's gradients sum
            over all rows and are given what a random walk of that many roundings comes to.

    Returns:
        what is off, in words; None when nothing is.
    """
    want, peer = truth(problem, leaves), eager(problem, leaves)
    for name, x in got.items():
        if x.numel() == 0:
            continue
        mine, theirs = ((y.double() - want[name]).abs().max().item() for y in (x, peer[name]))
        floor = max(tiny, torch.finfo(x.dtype).eps) * max(1.0, want[name].abs().max().item())
        if name.startswith("dprefix"):
            floor *= max(1.0, 0.1 * want["lse"].numel() ** 0.5)
        if not mine <= 2 * theirs + floor:  # so written that nan fails
            return f"{name}: error {mine:.2e}, eager's {theirs:.2e}"
    return None


def _gradients(o: Tensor, leaves: Leaves) -> dict[str, Tensor]:
    if not leaves.q.requires_grad:
        return {}
    grads = torch.autograd.grad(o, list(leaves.inputs.values()), leaves.do, materialize_grads=True)
    return {f"d{name}": grad for name, grad in zip(leaves.inputs, grads, strict=True)}
