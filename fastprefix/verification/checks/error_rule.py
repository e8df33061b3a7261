"""flash-attention's error rule: ``err(got) <= 2 * err(eager, same dtype) + tiny``, both against the fp64 reference."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from ... import reference
from ...masks import additive_bias, finite_bias, prefix_owner, visible_keys
from ...types import INPUTS, MASKED_BIAS, AttentionArgs, Needs

ALL = Needs(True, True, True, True, True)
ALL_AND_BIAS = ALL._replace(prefix_bias=True)
TINY = 1e-6  # an error that is always allowed, relative to the largest entry above 1

Results = Mapping[str, Tensor]  # o, lse, dq, dk, dv, dprefix_k, dprefix_v and gradients of options


def truth(args: AttentionArgs, do: Tensor | None = None) -> dict[str, Tensor]:
    """``o``, ``lse`` and, given ``do``, the five gradients, by the reference in fp64."""
    floats: dict[str, Any] = {
        field.name: x.detach().double()
        for field in fields(args)
        if isinstance(x := getattr(args, field.name), Tensor) and x.is_floating_point()
    }
    exact = replace(args, **floats)
    o, lse = reference.fwd(exact)
    found = {"o": o, "lse": lse}
    if do is not None:
        grads = reference.bwd(exact, o, lse, do.double(), needs(args))
        found.update({f"d{name}": getattr(grads, name) for name in trained(args)})
    return found


def trained(args: AttentionArgs) -> tuple[str, ...]:
    """Names of the inputs whose gradients are judged."""
    return INPUTS if args.prefix_bias is None else (*INPUTS, "prefix_bias")


def needs(args: AttentionArgs) -> Needs:
    """The gradients of :func:`trained`."""
    return ALL if args.prefix_bias is None else ALL_AND_BIAS


def eager(args: AttentionArgs, do: Tensor | None = None) -> dict[str, Tensor]:
    """The same by eager concatenation and softmax, with every step rounded to q's dtype."""
    names = trained(args)
    leaves: dict[str, Any] = {name: getattr(args, name).detach().requires_grad_(do is not None) for name in names}
    with torch.enable_grad():
        o, lse = eager_attention(replace(args, **leaves))
    found = {"o": o.detach(), "lse": lse}
    if do is not None:
        grads = torch.autograd.grad(o, list(leaves.values()), do, materialize_grads=True)
        found.update({f"d{name}": grad for name, grad in zip(names, grads, strict=True)})
    return found


def worst_error(got: Results, want: Results, rounded: Results, tiny: float = TINY) -> tuple[float, str]:
    """The largest error as a share of what the rule allows, and the tensor that has it, in words.

    Above 1 the rule is broken; infinite where there is a nan or an infinity in the wrong place.

    Args:
        got: results to judge.
        want: :func:`truth`.
        rounded: :func:`eager`, whose error says how exact the dtype can be.
        tiny: an error that is always allowed, raised to one rounding of the largest entry, in the coarser dtype of
            the tensor and of q. Sums are allowed a random walk of as many roundings as they have terms: the gradients
            of k and v those of the heads of a group, those of a prefix, a sink or a gate those of all rows.
    """
    worst, about = 0.0, ""
    computed = rounded["o"].dtype
    for name, x in got.items():
        if x.numel() == 0:
            continue
        if not torch.equal(x.isinf(), want[name].isinf()):
            return float("inf"), f"{name}: infinities differ from the truth's"
        right = want[name].masked_fill(want[name].isinf(), 0.0)  # lse of a row without a key
        mine, theirs = ((y.double().masked_fill(y.isinf(), 0.0) - right).abs().max().item() for y in (x, rounded[name]))
        coarsest = x.dtype if name == "lse" else max(x.dtype, computed, key=lambda dtype: torch.finfo(dtype).eps)
        allowed = max(tiny, torch.finfo(coarsest).eps) * max(1.0, right.abs().max().item())
        if name in ("dk", "dv"):
            allowed *= (want["o"].shape[1] / x.shape[1]) ** 0.5
        elif name == "dprefix_bias":  # each row's term has the rounding of its o, which is kept in q's dtype
            allowed *= want["lse"].numel() ** 0.5
        elif name not in ("o", "lse", "dq"):
            allowed *= max(1.0, 0.1 * want["lse"].numel() ** 0.5)
        share = mine / (2 * theirs + allowed)
        if not share <= worst:  # so written that nan counts
            worst = share if share == share else float("inf")
            about = f"{name}: error {mine:.2e}, eager's {theirs:.2e}"
    return worst, about


def eager_attention(args: AttentionArgs, gate: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``o`` and ``lse``, differentiable; a bank is one long prefix of which each row sees its own part.

    ``gate``: ``[H]`` or ``[B, H]``, two softmaxes as in ``prefix_attention``.
    """
    keys, values = (x.repeat_interleave(args.groups, 1) for x in (args.k, args.v))
    prefix_keys, prefix_values = (_one_prefix(x, args) for x in (args.prefix_k, args.prefix_v))
    content, prefix = (_capped(args.q @ x.transpose(-1, -2) * args.scale, args.softcap) for x in (keys, prefix_keys))
    bias, visible, mine = additive_bias(args), visible_keys(args), _own_prefix(args)
    if args.prefix_bias is not None:
        flat = _one_prefix(args.prefix_bias.unsqueeze(-1), args).squeeze(-1).unsqueeze(2)  # [B, H, 1, N * P]
        prefix = (prefix + finite_bias(flat)).masked_fill(~(flat > MASKED_BIAS), float("-inf"))
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
        return _attend(torch.cat([prefix, content, *sinks], -1), torch.cat([prefix_values, values], 2))
    o, lse = _attend(torch.cat([content, *sinks], -1), values)
    return o + gate.to(o.dtype)[..., None, None] * _attend(prefix, prefix_values)[0], lse


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
