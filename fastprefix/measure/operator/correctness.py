"""Whether a result is right: by its error against the reference in fp64, or by comparison with another result."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fastprefix.functional import prefix_attention
from fastprefix.masks import additive_bias, prefix_owner, visible_keys
from fastprefix.measure.operator.problem import Leaves, Problem
from fastprefix.types import AttentionArgs

Options = Mapping[str, Any]  # arguments of prefix_attention other than its five inputs

# How much two right results of one dtype may differ because they sum in other orders, relative to the largest entry.
TOLERANCES = {torch.float64: 1e-10, torch.float32: 2e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}


def disagreement(got: Mapping[str, Tensor], want: Mapping[str, Tensor], dtype: torch.dtype) -> str | None:
    """The first tensor of ``got`` that differs from ``want``'s, in words; None when all agree."""
    for name, x in got.items():
        if x.shape != want[name].shape:
            return f"{name} has shape {tuple(x.shape)}, not {tuple(want[name].shape)}"
        if x.numel() == 0:
            continue
        scale = max(1e-3, want[name].abs().max().item())  # 0 may be right, and then not to the last bit
        error = (x.float() - want[name].float()).abs().max().item()
        if not error <= TOLERANCES[dtype] * scale:  # so written that nan fails
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
    args = AttentionArgs(**given)
    keys, values = (x.repeat_interleave(args.groups, 1) for x in (leaves.k, leaves.v))
    prefix_keys, prefix_values = (_one_prefix(x, args) for x in (leaves.prefix_k, leaves.prefix_v))
    content, prefix = (_capped(args.q @ x.transpose(-1, -2) * args.scale, args.softcap) for x in (keys, prefix_keys))
    bias, visible, mine = additive_bias(args), visible_keys(args), _own_prefix(args)
    if bias is not None:
        content = content + bias.to(content.dtype)
    if visible is not None:
        content = content.masked_fill(~visible, float("-inf"))
    if mine is not None:
        prefix = prefix.masked_fill(~mine, float("-inf"))
    sinks = []
    if args.sinks is not None:
        sinks.append(args.sinks.to(prefix.dtype)[None, :, None, None].expand(*prefix.shape[:3], 1))
    if gate is None:
        o, lse = _attend(torch.cat([prefix, content, *sinks], -1), torch.cat([prefix_values, values], 2))
    else:
        o, lse = _attend(torch.cat([content, *sinks], -1), values)
        o = o + gate.to(o.dtype)[:, None, None] * _attend(prefix, prefix_values)[0]
    return {"o": o.detach(), "lse": lse, **_gradients(o, leaves, options or {})}


def broken_rule(
    problem: Problem,
    leaves: Leaves,
    got: Mapping[str, Tensor],
    options: Options | None = None,
    tiny: float = 1e-6,
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
    want, rounded = truth(problem, leaves, options), eager(problem, leaves, options)
    for name, x in got.items():
        if x.numel() == 0:
            continue
        if not torch.equal(x.isinf(), want[name].isinf()):
            return f"{name}: infinities differ from the truth's"
        right = want[name].masked_fill(want[name].isinf(), 0.0)  # lse of a row without a key
        mine, theirs = ((y.double().masked_fill(y.isinf(), 0.0) - right).abs().max().item() for y in (x, rounded[name]))
        floor = max(tiny, torch.finfo(x.dtype).eps) * max(1.0, right.abs().max().item())
        if name not in ("o", "lse", "dq", "dk", "dv"):
            floor *= max(1.0, 0.1 * want["lse"].numel() ** 0.5)
        if not mine <= 2 * theirs + floor:  # so written that nan fails
            return f"{name}: error {mine:.2e}, eager's {theirs:.2e}"
    return None


def _full(problem: Problem, options: Options | None) -> dict[str, Any]:
    return {"causal": problem.causal, **(options or {})}


def _capped(scores: Tensor, softcap: float | None) -> Tensor:
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def _one_prefix(x: Tensor, args: AttentionArgs) -> Tensor:
    """A prefix or bank as one prefix for each row, in q's dtype: ``[B, H, N * P, D]``; packed, ``[B, H, P, D]``."""
    bank = x if x.dim() == 4 else x[None]  # a packed one is flat already
    flat = bank.to(args.q.dtype).transpose(0, 1).flatten(1, 2).repeat_interleave(args.groups, 0)
    return flat.expand(args.q.shape[0], -1, -1, -1)


def _own_prefix(args: AttentionArgs) -> Tensor | None:
    """Which tokens of a bank belong to the row: ``[B, 1, S or 1, N * P]`` bool (packed: P); None without a bank."""
    if args.prefix_ids is None:
        return None
    ids = args.prefix_ids if args.prefix_ids.dim() == 2 else args.prefix_ids[:, None]
    number, tokens = args.num_prefixes, args.num_prefix_tokens
    if args.packed:
        assert args.prefix_lens is not None
        return ids[:, None, :, None] == prefix_owner(args.prefix_lens, tokens)
    token = torch.arange(number * tokens, device=args.q.device)
    own = ids[:, None, :, None] == token // max(tokens, 1)
    if args.prefix_lens is not None:
        own = own & (token % max(tokens, 1) < args.prefix_lens.repeat_interleave(tokens))
    return own


def _attend(scores: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax over scores, times values, and lse; scores in excess of the values are sinks.

    A row whose keys are all hidden gives o = 0 and lse = -inf.
    """
    empty = (scores == float("-inf")).all(-1, keepdim=True)
    p = torch.softmax(scores.masked_fill(empty, 0.0), -1).masked_fill(empty, 0.0)
    return p[..., : values.shape[2]] @ values, torch.logsumexp(scores.detach(), -1)


def _gradients(o: Tensor, leaves: Leaves, options: Options) -> dict[str, Tensor]:
    if not leaves.q.requires_grad:
        return {}
    more = {name: x for name, x in options.items() if isinstance(x, Tensor) and x.requires_grad}
    trained = {**leaves.inputs, **more}
    grads = torch.autograd.grad(o, list(trained.values()), leaves.do, materialize_grads=True)
    return {f"d{name}": grad for name, grad in zip(trained, grads, strict=True)}
