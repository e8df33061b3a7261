"""Whether a result is right: by its error against the reference in fp64, or by comparison with another result."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fastprefix.functional import prefix_attention
from fastprefix.measure.operator.problem import Leaves, Problem
from fastprefix.types import AttentionArgs
from fastprefix.verification.checks.bucket_timing import MAY_DIFFER
from fastprefix.verification.checks.error_rule import TINY, eager_attention, worst_error

Options = Mapping[str, Any]  # arguments of prefix_attention other than its five inputs


def disagreement(got: Mapping[str, Tensor], want: Mapping[str, Tensor], dtype: torch.dtype) -> str | None:
    """The first tensor of ``got`` that differs from ``want``'s, in words; None when all agree."""
    for name, x in got.items():
        if x.shape != want[name].shape:
            return f"{name} has shape {tuple(x.shape)}, not {tuple(want[name].shape)}"
        if x.numel() == 0:
            continue
        scale = max(1e-3, want[name].abs().max().item())  # 0 may be right, and then not to the last bit
        error = (x.float() - want[name].float()).abs().max().item()
        if not error <= MAY_DIFFER[dtype] * scale:  # so written that nan fails
            return f"{name} is off by {error:.2e} where the largest entry is {scale:.2e}"
    return None


def truth(problem: Problem, leaves: Leaves, options: Options | None = None) -> dict[str, Tensor]:
    """``o``, ``lse`` and the gradients, computed by the reference backend in fp64."""

    def cast(x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        return x.detach().to(torch.float64).requires_grad_(x.requires_grad)

    options = {name: cast(x) for name, x in _full(problem, options).items()}
    return results(leaves.to(torch.float64), backend="reference", **options)


def results(
    leaves: Leaves, *, backend: str, op: Callable[..., tuple[Tensor, Tensor]] | None = None, **options: Any
) -> dict[str, Tensor]:
    """``o``, ``lse`` and the gradients of the operator, or of ``op``, a compiled form of it.

    There are gradients of the five inputs if q requires one, and then also of every option that requires one.
    """
    call = op or prefix_attention
    o, lse = call(**leaves.inputs, **options, return_lse=True, backend=backend)
    return {"o": o.detach(), "lse": lse, **_gradients(o, leaves, options)}


def eager(problem: Problem, leaves: Leaves, options: Options | None = None) -> dict[str, Tensor]:
    """The same by eager concatenation and softmax, with every step rounded to the dtype of the leaves.

    A bank is treated as one long prefix of which each row sees its own part.
    """
    given = _full(problem, options)
    gate, scale = (given.pop(name, None) for name in ("gate", "scale"))
    given.update(leaves.inputs, scale=leaves.q.shape[3] ** -0.5 if scale is None else scale)
    o, lse = eager_attention(AttentionArgs(**given), gate)
    return {"o": o.detach(), "lse": lse, **_gradients(o, leaves, options or {})}


def broken_rule(
    problem: Problem,
    leaves: Leaves,
    got: Mapping[str, Tensor],
    options: Options | None = None,
    tiny: float = TINY,
) -> str | None:
    """flash-attention's rule: ``err(got) <= 2 * err(eager, same dtype) + tiny``, both against fp64 truth.

    Args:
        got: the return value of :func:`results` for the same leaves and options.
        options: further arguments of the operator; without ``causal`` among them, the problem's is taken.
        tiny: an error that is always allowed, raised to one rounding of the largest entry. Gradients that are sums
            over all rows (of a prefix, a sink, a gate) are allowed a random walk of that many roundings.

    Returns:
        the first violation, in words; None when the rule holds.
    """
    share, about = worst_error(got, truth(problem, leaves, options), eager(problem, leaves, options), tiny)
    return about if share > 1 else None


def _full(problem: Problem, options: Options | None) -> dict[str, Any]:
    return {"causal": problem.causal, **(options or {})}


def _gradients(o: Tensor, leaves: Leaves, options: Options) -> dict[str, Tensor]:
    if not leaves.q.requires_grad:
        return {}
    more = {name: x for name, x in options.items() if isinstance(x, Tensor) and x.requires_grad}
    trained = {**leaves.inputs, **more}
    grads = torch.autograd.grad(o, list(trained.values()), leaves.do, materialize_grads=True)
    return {f"d{name}": grad for name, grad in zip(trained, grads, strict=True)}
