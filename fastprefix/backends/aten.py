"""Vendor attention on the content and, the batch folded into the rows, on the prefix; merged by log-sum-exp.

On CUDA a short prefix is not a vendor call of its own: our epilogue kernels add it in place to the vendor's result.
Each part's backward is the ordinary flash backward given the merged ``o`` and ``lse`` (FlashAttention-2, Dao 2023,
applied per part), so nothing else is saved.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..machine.device import is_capturing
from ..types import AttentionArgs, Grads, Needs, to_bshd
from . import aten_ops, aten_routes, concatenated_prefix, prefix_bias
from .aten_routes import Route
from .content_blocks import content_blocks, has_rows_outside_keys, int_start, mask_dtype
from .fold_batch import PrefixRows, fold, prefix_rows, unfold, unit_rows
from .merge_states import add_sink, merge_lse, merge_state, mix_outputs

_NOTHING: tuple[Tensor | None, ...] = (None,) * 5


def routes(device_type: str) -> tuple[str, ...]:
    """Names of the ways in which a device's vendor kernels can compute a call."""
    return tuple(aten_routes.ROUTES.get(device_type, ()))


def guess(args: AttentionArgs) -> str:
    """The route that is taken where none is asked for."""
    return aten_routes.name_of(args.q.device.type, aten_routes.guess(args))


def unsupported(args: AttentionArgs, route: str | None = None) -> list[str]:
    """Why this backend, or one route of it, cannot take the call; empty when it can."""
    reasons = []
    if args.softcap is not None:
        reasons.append("softcap: no vendor op caps scores")
    if args.dropout_p > 0.0:
        reasons.append("dropout_p: vendor ops cannot drop over prefix and content as one softmax")
    if args.bias_grad:
        reasons.append("bias: vendor ops return no gradient for it")
    device = args.q.device.type
    if device not in ("cpu", "cuda"):
        reasons.append(f"device {device}: only cpu and cuda have the vendor ops")
    if device == "cuda":
        reasons += _reasons_on_cuda(args)
    if route is not None and not reasons:
        reasons += aten_routes.reasons(args, route)
    return reasons


def _reasons_on_cuda(args: AttentionArgs) -> list[str]:
    """Why CUDA's vendor kernels cannot take a call that a processor's can."""
    reasons = []
    if args.q.dtype not in (torch.float16, torch.bfloat16):
        reasons.append(f"dtype {args.q.dtype}: flash attention on cuda takes fp16 and bf16")
    if max(args.q.shape[3], args.v.shape[3]) > 256 or max(args.q.shape[3], args.v.shape[3]) % 8:
        reasons.append("head dim: flash attention on cuda takes multiples of 8 up to 256")
    present = (args.key_padding_mask, args.segment_ids, args.window, args.bias, args.prefix_bias)
    masks = ("key_padding_mask", "segment_ids", "window", "bias", "prefix_bias")
    reasons += [
        f"{n}: flash attention on cuda takes no mask" for n, x in zip(masks, present, strict=True) if x is not None
    ]
    if args.scale < 0.0 or (args.causal and args.scale == 0.0):
        reasons.append("scale: flash attention on cuda masks, and takes its maximum, before it scales")
    if args.prefix_ids is not None and is_capturing(args.q.device):
        reasons.append("prefix_ids: the host reads which rows share a prefix, which no capture of a graph allows")
    if int_start(args) is None:
        reasons.append("q_start: a tensor needs a mask, which flash attention on cuda does not take")
    elif args.causal and has_rows_outside_keys(args):
        reasons.append("q_start: rows outside the keys need a mask, which flash attention on cuda does not take")
    return reasons


def fwd(args: AttentionArgs, route: str | None = None) -> tuple[Tensor, Tensor]:
    """``o [B, H, S, D_v]`` and ``lse [B, H, S]`` of the merged softmax; without a route, by one that is guessed."""
    if args.q.numel() == 0:  # vendor kernels divide by the number of rows
        return _nothing(args)
    way = aten_routes.find(args, route)
    if way.prefix == "concatenated":
        o, lse = concatenated_prefix.fwd(args)
    else:
        content = _content(args, way)
        if way.prefix == "epilogue" and content is not None:
            merged: tuple[Tensor, Tensor] = aten_routes.epilogue().fwd(args, *content)
            return merged
        o, lse = _merged(args, content, way)
    if args.sinks is not None:
        o, lse = add_sink(o, lse, args.sinks)
    if _may_be_empty(args):
        o = o.masked_fill((lse == float("-inf")).unsqueeze(-1), 0.0)
    return o, lse


def _content(args: AttentionArgs, way: Route) -> tuple[Tensor, Tensor] | None:
    """A vendor call for each block of the content, merged; None without any."""
    state: tuple[Tensor, Tensor] | None = None
    for block in content_blocks(args):
        k, v = args.k[:, :, block.first : block.last], args.v[:, :, block.first : block.last]
        other = aten_ops.fwd(args.q, k, v, block.causal, block.mask, args.scale, way.cudnn)
        state = other if state is None else merge_state(*state, *other)
    return state


def _merged(args: AttentionArgs, state: tuple[Tensor, Tensor] | None, way: Route) -> tuple[Tensor, Tensor]:
    """The content's state merged with a vendor call for each prefix, or for several of one length."""
    heads = args.q.shape[1]
    found = []
    for prefix in prefix_rows(args, way.prefix == "packed"):
        q, mask = fold(args.q, prefix), prefix_bias.mask_of(args, prefix)
        found.append((prefix, *aten_ops.fwd(q, *prefix.keys_values(args), False, mask, args.scale, way.cudnn)))
    if not found:
        return _nothing(args) if state is None else state
    prefix, o, lse = found[0]
    if prefix.whole:
        o, lse = (unfold(x, heads, prefix).transpose(1, 2) for x in (o, lse.unsqueeze(-1)))
        return (o, lse.squeeze(-1)) if state is None else merge_state(*state, o, lse.squeeze(-1))
    o, lse = _nothing(args) if state is None else state
    o, own_lse = to_bshd(o), torch.full_like(to_bshd(lse.unsqueeze(-1)), float("-inf"))
    for prefix, _, part in found:
        unit_rows(own_lse, prefix.by_token)[prefix.group.units] = unfold(part.unsqueeze(-1), heads, prefix)
    lse, mass = merge_lse(lse, own_lse.squeeze(-1))
    for prefix, part, _ in found:
        place, share = (unit_rows(x, prefix.by_token) for x in (o, mass))
        mixed = mix_outputs(prefix.group.rows_of(place), unfold(part, heads, prefix), prefix.group.rows_of(share))
        if isinstance(prefix.group.units, Tensor):  # what was mixed is a copy
            place.index_copy_(0, prefix.group.units, mixed)
    return o, lse


def _nothing(args: AttentionArgs) -> tuple[Tensor, Tensor]:
    """The output and log-sum-exp of rows that see no key: 0 and -inf."""
    batch, num_heads, seq = args.q.shape[:3]
    o = args.q.new_zeros(batch, seq, num_heads, args.v.shape[-1]).transpose(1, 2)
    return o, args.q.new_full((batch, num_heads, seq), float("-inf"), dtype=mask_dtype(args))


def _may_be_empty(args: AttentionArgs) -> bool:
    """Whether a row could see no key at all."""
    if args.prefix_bias is not None:  # which may hide the prefix
        return True
    if args.prefix_ids is None and args.num_prefix_tokens:
        return False
    return any(block.mask is not None for block in content_blocks(args))


def bwd(args: AttentionArgs, o: Tensor, lse: Tensor, do: Tensor, needs: Needs, route: str | None = None) -> Grads:
    """Gradients of :func:`fwd`; a part that nothing needs is not launched."""
    if args.q.numel() == 0:
        tensors = (args.q, args.k, args.v, args.prefix_k, args.prefix_v, args.bias, args.prefix_bias)
        asked = zip(tensors, needs, strict=True)
        return Grads(*(torch.zeros_like(x) if need and x is not None else None for x, need in asked))
    # exp(score - lse) must vanish, not overflow, in a row that saw nothing, or nothing but a sink as low as a mask.
    lse = lse.masked_fill(lse < aten_ops.EMPTY_LSE, 0.0)
    dq, dk, dv, dprefix_k, dprefix_v = _NOTHING
    dbias = None
    way = aten_routes.find(args, route)
    if needs.content and way.prefix == "concatenated":
        dq, dk, dv, dprefix_k, dprefix_v = concatenated_prefix.bwd(args, o, lse, do)
    else:
        if needs.content:
            dq, dk, dv = _content_bwd(args, o, lse, do, way)
        if needs.prefix and way.prefix == "epilogue" and not aten_routes.epilogue().bwd_reasons(args):
            dq, dprefix_k, dprefix_v = aten_routes.epilogue().bwd(args, o, lse, do, dq, needs)
        elif needs.prefix:
            dq, dprefix_k, dprefix_v, dbias = _prefix_bwd(args, o, lse, do, dq, needs, way)
    if needs.q and dq is None:
        dq = torch.zeros_like(args.q)
    return Grads(
        q=dq if needs.q else None,
        k=dk if needs.k else None,
        v=dv if needs.v else None,
        prefix_k=dprefix_k if needs.prefix_k else None,
        prefix_v=dprefix_v if needs.prefix_v else None,
        prefix_bias=dbias,
    )


def _content_bwd(
    args: AttentionArgs, o: Tensor, lse: Tensor, do: Tensor, way: Route
) -> tuple[Tensor | None, Tensor, Tensor]:
    """dq of the content blocks, and dK, dV of every key: 0 for those that no row sees."""
    dq: Tensor | None = None
    grads: list[tuple[Tensor, Tensor]] = []
    covered = 0
    for block in content_blocks(args):
        k, v = args.k[:, :, block.first : block.last], args.v[:, :, block.first : block.last]
        block_dq, dk, dv = aten_ops.bwd(do, args.q, k, v, o, lse, block.causal, block.mask, args.scale, way.cudnn)
        dq = block_dq if dq is None else dq.add_(block_dq)
        grads.append((dk, dv))
        covered = block.last
    if covered < args.k.shape[2]:
        grads.append((torch.zeros_like(args.k[:, :, covered:]), torch.zeros_like(args.v[:, :, covered:])))
    if not grads:
        return None, torch.zeros_like(args.k), torch.zeros_like(args.v)
    if len(grads) == 1:
        return dq, *grads[0]
    dk, dv = (torch.cat(x, dim=2) for x in zip(*grads, strict=True))
    return dq, dk, dv


def _prefix_bwd(
    args: AttentionArgs, o: Tensor, lse: Tensor, do: Tensor, dq: Tensor | None, needs: Needs, way: Route
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """dq with the prefix part's added in place; dPrefix and dBias summed over batch, rows and the heads of a group."""
    found = list(prefix_rows(args, way.prefix == "packed"))
    read = sum(prefix.group.prefixes * prefix.group.length for prefix in found)
    every = read * args.k.shape[1] * args.q.shape[3] == args.prefix_k.numel()
    room = torch.empty_like if every else torch.zeros_like
    dprefix_k = room(args.prefix_k) if needs.prefix_k else None
    dprefix_v = room(args.prefix_v) if needs.prefix_v else None
    dbias = room(args.prefix_bias) if needs.prefix_bias and args.prefix_bias is not None else None
    for prefix in found:
        q, do_, o_ = (fold(x, prefix) for x in (args.q, do, o))
        lse_ = fold(lse.unsqueeze(-1), prefix).squeeze(-1)
        keys, values = prefix.keys_values(args)
        mask = prefix_bias.mask_of(args, prefix)
        if dbias is not None and mask is not None:
            own = prefix_bias.gradient(args, prefix, (q, do_, o_, lse_), mask, keys, values)
            prefix.group.keys_of(dbias.unsqueeze(-1)).copy_(own.unsqueeze(-1))
        if not (needs.q or needs.prefix_k or needs.prefix_v):
            continue
        part, *parts_kv = aten_ops.bwd(do_, q, keys, values, o_, lse_, False, mask, args.scale, way.cudnn)
        if needs.q:
            dq = _with_rows(dq, args, prefix, unfold(part, args.q.shape[1], prefix))
        for out, grad in zip((dprefix_k, dprefix_v), parts_kv, strict=True):
            if out is not None:
                several = prefix.chunks > prefix.group.prefixes  # chunks of one prefix
                prefix.group.keys_of(out).copy_(grad.sum(0, keepdim=True, dtype=lse.dtype) if several else grad)
    return dq, dprefix_k, dprefix_v, dbias


def _with_rows(dq: Tensor | None, args: AttentionArgs, prefix: PrefixRows, part: Tensor) -> Tensor:
    """dq plus the prefix's share of it, for the units that read the prefix."""
    if dq is None and prefix.whole:
        return part.transpose(1, 2)
    dq = to_bshd(torch.zeros_like(args.q) if dq is None else dq)
    place, own = unit_rows(dq, prefix.by_token), prefix.group.units
    if isinstance(own, Tensor):
        place.index_add_(0, own, part)
    else:
        place[own].add_(part)
    return dq
