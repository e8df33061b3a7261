"""The reference: concatenates prefix and content, with one softmax in fp32 (fp64 for fp64). Supports all arguments.

``attention`` is plain differentiable torch; in fp64 it is the truth that every backend is compared with. ``fwd`` and
``bwd`` make a backend of it, with the backward written out (dS = A * (dA - delta), delta = rowsum(do * o)).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .masks import additive_bias, finite_bias, prefix_owner, visible_keys
from .types import MASKED_BIAS, AttentionArgs, Grads, Needs, lse_dtype


class _Dense(NamedTuple):
    """All tensors at full size, in the compute dtype, with key/value heads repeated for each query head."""

    q: Tensor  # [B, H, S, D]
    k: Tensor  # [B, H, T, D]
    v: Tensor  # [B, H, T, D_v]
    prefix_k: Tensor  # [B or 1, H, P, D]; [B*S, H, P, D] when every row has its own prefix
    prefix_v: Tensor  # the same, with D_v
    prefix_visible: Tensor | None  # [B or B*S, 1 or H, 1, P]; None: all visible
    prefix_bias: Tensor | None  # [B, H, S or 1, P], finite


def _dense(args: AttentionArgs) -> _Dense:
    compute = lse_dtype(args.q.dtype)
    groups = args.groups

    def heads(x: Tensor) -> Tensor:
        return x.to(compute).repeat_interleave(groups, dim=1)

    # A hidden key must not reach the output, not even as 0 * nan.
    k, v = heads(args.k), heads(args.v)
    if args.key_padding_mask is not None:
        hidden = ~args.key_padding_mask[:, None, :, None]
        k, v = k.masked_fill(hidden, 0.0), v.masked_fill(hidden, 0.0)
    visible = None  # [rows, 1 or H, P]
    prefix = [args.prefix_k, args.prefix_v]
    if args.prefix_bias is not None:
        prefix.append(args.prefix_bias.unsqueeze(-1))
    if args.prefix_ids is None:
        prefix = [heads(x.unsqueeze(0)) for x in prefix]
    else:
        ids, visible = _bank_rows(args)
        # With a packed bank every row has all tokens, and those of other prefixes are hidden.
        own = (x.expand(len(ids), -1, -1, -1) if args.packed else x[ids] for x in prefix)
        hidden = ~visible.unsqueeze(-1)  # [rows, 1, P, 1]
        prefix = [heads(x).masked_fill(hidden, 0.0) for x in own]
    bias = None
    if args.prefix_bias is not None:
        bias = prefix[2].squeeze(-1)  # [rows, H, P]
        visible = bias > MASKED_BIAS if visible is None else visible & (bias > MASKED_BIAS)
        bias = _per_sample(args, finite_bias(bias).unsqueeze(2))
    return _Dense(
        args.q.to(compute), k, v, prefix[0], prefix[1], None if visible is None else visible.unsqueeze(2), bias
    )


def _bank_rows(args: AttentionArgs) -> tuple[Tensor, Tensor]:
    """Bank index ``[rows]`` (0 where there is no prefix) and visible prefix tokens ``[rows, 1, P]``."""
    assert args.prefix_ids is not None
    ids = args.prefix_ids.reshape(-1).long()
    if args.packed:
        assert args.prefix_lens is not None
        return ids.clamp(min=0), (prefix_owner(args.prefix_lens, args.num_prefix_tokens) == ids[:, None]).unsqueeze(1)
    visible = (ids >= 0)[:, None]
    ids = ids.clamp(min=0)
    if args.prefix_lens is not None:
        token = torch.arange(args.num_prefix_tokens, device=ids.device)
        visible = visible & (token < args.prefix_lens.to(ids.device)[ids][:, None])
    return ids, visible.expand(-1, args.num_prefix_tokens).unsqueeze(1)


def _per_row(args: AttentionArgs, x: Tensor) -> Tensor:
    """``[B, H, S, X] -> [B*S, H, 1, X]`` when every query row has a prefix of its own, else unchanged."""
    if args.prefix_ids is None or args.prefix_ids.dim() == 1:
        return x
    return x.transpose(1, 2).flatten(0, 1).unsqueeze(2)


def _per_sample(args: AttentionArgs, x: Tensor) -> Tensor:
    """The inverse of :func:`_per_row`."""
    if args.prefix_ids is None or args.prefix_ids.dim() == 1:
        return x
    return x.squeeze(2).unflatten(0, (args.q.shape[0], args.q.shape[2])).transpose(1, 2)


def _cap(args: AttentionArgs, scores: Tensor) -> Tensor:
    return scores if args.softcap is None else args.softcap * torch.tanh(scores / args.softcap)


def _scores(args: AttentionArgs, x: _Dense) -> tuple[Tensor, Tensor]:
    """Capped scores of prefix ``[B, H, S, P]`` and content ``[B, H, S, T]``; hidden prefix tokens -inf, no bias."""
    prefix = _cap(args, _per_row(args, x.q) @ x.prefix_k.transpose(-1, -2) * args.scale)
    if x.prefix_visible is not None:
        prefix = prefix.masked_fill(~x.prefix_visible, float("-inf"))
    content = _cap(args, x.q @ x.k.transpose(-1, -2) * args.scale)
    return _per_sample(args, prefix), content


def _logits(args: AttentionArgs, x: _Dense, prefix: Tensor, content: Tensor) -> Tensor:
    """Scores of prefix, content and sink, concatenated to the softmax's input ``[B, H, S, P + T (+ 1)]``."""
    bias, visible = additive_bias(args), visible_keys(args)
    if x.prefix_bias is not None:
        prefix = prefix + x.prefix_bias
    if bias is not None:
        content = content + bias.to(content.dtype)
    if visible is not None:
        content = content.masked_fill(~visible, float("-inf"))
    columns = [prefix, content]
    if args.sinks is not None:
        sink = args.sinks.to(content.dtype)[None, :, None, None]
        columns.append(sink.expand(*content.shape[:3], 1))
    return torch.cat(columns, dim=-1)


def _keep(args: AttentionArgs, like: Tensor) -> Tensor | None:
    """Dropout's multiplier for ``[B, H, S, P + T]`` probabilities: 0 or 1 / (1 - p), the same in both passes."""
    if args.dropout_p == 0.0:
        return None
    assert args.dropout_seed is not None
    generator = torch.Generator(device=like.device).manual_seed(int(args.dropout_seed))
    draw = torch.rand(like.shape, generator=generator, device=like.device, dtype=torch.float32)
    return (draw >= args.dropout_p).to(like.dtype) / (1.0 - args.dropout_p)


def _probabilities(args: AttentionArgs, logits: Tensor, lse: Tensor) -> Tensor:
    """``exp(logits - lse)`` without the sink's column; 0 in a row that sees nothing."""
    shift = lse.masked_fill(lse == float("-inf"), 0.0).unsqueeze(-1)
    return torch.exp(logits - shift)[..., : args.num_prefix_tokens + args.k.shape[2]]


def attention(args: AttentionArgs) -> tuple[Tensor, Tensor]:
    """``o [B, H, S, D_v]`` in the compute dtype and ``lse [B, H, S]``; differentiable by autograd."""
    x = _dense(args)
    logits = _logits(args, x, *_scores(args, x))
    lse = torch.logsumexp(logits, dim=-1) if logits.shape[-1] else logits.new_full(logits.shape[:3], float("-inf"))
    p = _probabilities(args, logits, lse)
    keep = _keep(args, p)
    if keep is not None:
        p = p * keep
    num_prefix = args.num_prefix_tokens
    o_prefix = _per_sample(args, _per_row(args, p[..., :num_prefix]) @ x.prefix_v)
    return o_prefix + p[..., num_prefix:] @ x.v, lse


def routes(device_type: str) -> tuple[str, ...]:
    """Names of the ways in which a call can be computed: one, without a name of its own."""
    return ("",)


def unsupported(args: AttentionArgs, route: str | None = None) -> list[str]:
    """Reasons why this backend cannot run a call: there are never any."""
    return []


def fwd(args: AttentionArgs, route: str | None = None) -> tuple[Tensor, Tensor]:
    """``o`` in q's dtype, ``lse`` in fp32 (fp64 for fp64)."""
    o, lse = attention(args)
    return o.to(args.q.dtype), lse


def bwd(args: AttentionArgs, o: Tensor, lse: Tensor, do: Tensor, needs: Needs, route: str | None = None) -> Grads:
    """Gradients of ``fwd``, each in its tensor's dtype; None where ``needs`` says so."""
    x = _dense(args)
    prefix_s, content_s = _scores(args, x)
    p = _probabilities(args, _logits(args, x, prefix_s, content_s), lse)
    num_prefix = args.num_prefix_tokens
    do_ = do.to(x.q.dtype)
    delta = (do_ * o.to(x.q.dtype)).sum(-1, keepdim=True)  # [B, H, S, 1]
    dp_prefix = _per_sample(args, _per_row(args, do_) @ x.prefix_v.transpose(-1, -2))
    dp = torch.cat([dp_prefix, do_ @ x.v.transpose(-1, -2)], dim=-1)
    dropped, keep = p, _keep(args, p)
    if keep is not None:
        dp, dropped = dp * keep, p * keep
    ds = p * (dp - delta)
    dbias = _reduce_to(ds[..., num_prefix:], args.bias) if needs.bias and args.bias is not None else None
    unscaled = ds[..., :num_prefix]
    if args.softcap is not None:
        slope = 1.0 - (torch.cat([prefix_s, content_s], dim=-1) / args.softcap).square()
        ds = ds * slope.masked_fill(slope.isinf(), 0.0)
    ds_prefix, ds_content = ds[..., :num_prefix], ds[..., num_prefix:]

    def shared(dx: Tensor, like: Tensor) -> Tensor:
        """Sum over the query heads of each group: ``[B, H, T, X] -> [B, H_kv, T, X]``."""
        return dx.unflatten(1, (-1, args.groups)).sum(2).to(like.dtype)

    def prefix_grad(dx: Tensor, like: Tensor) -> Tensor:
        dx = dx.unflatten(1, (-1, args.groups)).sum(2)  # [B or B*S, H_kv, P, X]
        if args.prefix_ids is None:
            return dx.sum(0).to(like.dtype)
        ids, visible = _bank_rows(args)
        if args.packed:  # a row's nan must not reach prefixes that it does not read
            return dx.masked_fill(~visible.unsqueeze(-1), 0.0).sum(0).to(like.dtype)
        return dx.new_zeros(like.shape).index_add_(0, ids, dx).to(like.dtype)

    dprefix_bias = None
    if needs.prefix_bias and args.prefix_bias is not None:
        sums = _per_row(args, unscaled).sum(2).unsqueeze(-1)  # [B or B*S, H, P, 1]
        dprefix_bias = prefix_grad(sums, args.prefix_bias.unsqueeze(-1)).squeeze(-1)
    dq = None
    if needs.q:
        dq = _per_sample(args, _per_row(args, ds_prefix) @ x.prefix_k) + ds_content @ x.k
        dq = (dq * args.scale).to(args.q.dtype)
    rows_s, rows_p = (_per_row(args, t).transpose(-1, -2) for t in (ds_prefix, dropped[..., :num_prefix]))
    return Grads(
        q=dq,
        k=shared(ds_content.transpose(-1, -2) @ x.q * args.scale, args.k) if needs.k else None,
        v=shared(dropped[..., num_prefix:].transpose(-1, -2) @ do_, args.v) if needs.v else None,
        prefix_k=prefix_grad(rows_s @ _per_row(args, x.q) * args.scale, args.prefix_k) if needs.prefix_k else None,
        prefix_v=prefix_grad(rows_p @ _per_row(args, do_), args.prefix_v) if needs.prefix_v else None,
        bias=dbias,
        prefix_bias=dprefix_bias,
    )


def _reduce_to(grad: Tensor, like: Tensor) -> Tensor:
    """Sum ``[B, H, S, T]`` over the dimensions in which ``like`` was broadcast."""
    return grad.sum_to_size(like.shape).to(like.dtype)
