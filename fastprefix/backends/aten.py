"""Vendor attention on the content and, with the batch folded into the rows, on the prefix; merged by log-sum-exp.

The content is cut so that a vendor kernel takes it without a dense mask wherever that can be: under a causal mask
with a cache, the past (no mask) and the present (square causal) are two parts. Each part's backward is the ordinary
flash backward given the merged ``o`` and ``lse`` (DESIGN section 2), so nothing else is saved.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastprefix.backends import vendor
from fastprefix.backends.merge import add_sink, merge
from fastprefix.masks import additive_bias, visible_keys
from fastprefix.types import AttentionArgs, Grads, Needs

# Below this many query tokens a group's heads are folded into the rows as well, so that decoding reads each prefix
# tile once per key/value head; above it the copy of q that this takes costs more than it saves.
FOLD_GROUP_UP_TO = 16


def unsupported(args: AttentionArgs) -> list[str]:
    """Why this backend cannot take the call; empty when it can."""
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
        if args.q.dtype not in (torch.float16, torch.bfloat16):
            reasons.append(f"dtype {args.q.dtype}: flash attention on cuda takes fp16 and bf16")
        if max(args.q.shape[3], args.v.shape[3]) > 256 or max(args.q.shape[3], args.v.shape[3]) % 8:
            reasons.append("head dim: flash attention on cuda takes multiples of 8 up to 256")
        present = (args.key_padding_mask, args.segment_ids, args.window, args.bias)
        masks = ("key_padding_mask", "segment_ids", "window", "bias")
        reasons += [
            f"{n}: flash attention on cuda takes no mask" for n, x in zip(masks, present, strict=True) if x is not None
        ]
        if _int_start(args) is None:
            reasons.append("q_start: a tensor needs a mask, which flash attention on cuda does not take")
        elif args.causal and _spill(args):
            reasons.append("q_start: rows outside the keys need a mask, which flash attention on cuda does not take")
    return reasons


class _Part(NamedTuple):
    """One vendor call on content: keys ``first`` to ``last``."""

    first: int
    last: int
    causal: bool
    mask: Tensor | None


def _int_start(args: AttentionArgs) -> int | None:
    """q_start as a number; None when it differs between samples or would have to be read from a device."""
    start = args.q_start
    if start is None:
        return args.k.shape[2] - args.q.shape[2]
    if isinstance(start, int):
        return start
    if start.device.type != "cpu" or start.numel() == 0:
        return None
    values = start.reshape(-1)
    return int(values[0]) if bool((values == values[0]).all()) else None


def _spill(args: AttentionArgs) -> bool:
    """Whether some query position lies before the first or behind the last key."""
    start = _int_start(args)
    return start is None or start < 0 or start + args.q.shape[2] > args.k.shape[2]


def _parts(args: AttentionArgs) -> Iterator[_Part]:
    seq, keys = args.q.shape[2], args.k.shape[2]
    if keys == 0:
        return
    dense = args.segment_ids is not None or args.bias is not None or args.window is not None
    if dense or (args.causal and _spill(args)):
        yield _Part(0, keys, False, _dense_mask(args))
        return
    padding = None
    if args.key_padding_mask is not None:
        padding = _hide(args.key_padding_mask[:, None, None, :], args)  # [B, 1, 1, T]
    if not args.causal:
        yield _Part(0, keys, False, padding)
        return
    start = _int_start(args)
    assert start is not None
    if seq == 1:
        yield _Part(0, start + 1, False, _columns(padding, 0, start + 1))
        return
    if start > 0:
        yield _Part(0, start, False, _columns(padding, 0, start))
    yield _Part(start, start + seq, True, _columns(padding, start, start + seq))


def _columns(mask: Tensor | None, first: int, last: int) -> Tensor | None:
    return None if mask is None else mask[..., first:last]


def _mask_dtype(args: AttentionArgs) -> torch.dtype:
    return torch.float64 if args.q.dtype == torch.float64 else torch.float32


def _hide(visible: Tensor, args: AttentionArgs) -> Tensor:
    return torch.zeros(visible.shape, dtype=_mask_dtype(args), device=visible.device).masked_fill_(
        ~visible, vendor.MASK
    )


def _dense_mask(args: AttentionArgs) -> Tensor | None:
    visible, bias = visible_keys(args), additive_bias(args)
    if bias is not None:
        bias = bias.detach().to(_mask_dtype(args))
        mask = bias if visible is None else torch.where(visible, bias, vendor.MASK)
    elif visible is not None:
        mask = _hide(visible, args)
    else:
        return None
    # Vendor kernels broadcast dimensions of size 1 but want the keys spelled out.
    return mask.expand(*mask.shape[:-1], args.k.shape[2]).contiguous()


class _Prefix(NamedTuple):
    """One prefix and the query rows that read it. ``rows`` None: every row."""

    k: Tensor  # [H_kv, P, D]
    v: Tensor  # [H_kv, P, D_v]
    rows: tuple[Tensor, Tensor] | None  # batch and query indices, [R] each
    number: int | None  # in the bank


def _prefixes(args: AttentionArgs) -> Iterator[_Prefix]:
    prefix_k, prefix_v = args.prefix_k.detach().to(args.q.dtype), args.prefix_v.detach().to(args.q.dtype)
    if args.prefix_ids is None:
        if args.num_prefix_tokens:
            yield _Prefix(prefix_k, prefix_v, None, None)
        return
    ids = args.prefix_ids if args.prefix_ids.dim() == 2 else args.prefix_ids[:, None].expand(-1, args.q.shape[2])
    lens = None if args.prefix_lens is None else args.prefix_lens.tolist()
    for n in ids.unique().tolist():
        length = args.num_prefix_tokens if lens is None else lens[n]
        if n >= 0 and length > 0:
            batch, row = (ids == n).nonzero(as_tuple=True)
            yield _Prefix(prefix_k[n, :, :length], prefix_v[n, :, :length], (batch, row), n)


def _fold(x: Tensor, prefix: _Prefix, heads: int) -> Tensor:
    """``[B, H, S, X] -> [1, heads, rows, X]``: the batch (and with ``heads = H_kv`` the group) becomes rows.

    A view when x is stored as [B, S, H, X] and ``heads = H``, which is how models hold their queries.
    """
    rows = x.transpose(1, 2)  # [B, S, H, X]
    rows = rows.flatten(0, 1) if prefix.rows is None else rows[prefix.rows]  # [R, H, X]
    groups = rows.shape[1] // heads
    if groups > 1:
        rows = rows.unflatten(1, (heads, groups)).transpose(1, 2).flatten(0, 1)  # [R * G, H_kv, X]
    return rows.transpose(0, 1).unsqueeze(0)


def _unfold(x: Tensor, like: Tensor, prefix: _Prefix, fill: float) -> Tensor:
    """The inverse of :func:`_fold`, ``[1, heads, rows, ...] -> [B, H, S, ...]``; other prefixes' rows get ``fill``."""
    batch, num_heads, seq = like.shape[:3]
    rows = x.squeeze(0).transpose(0, 1)  # [rows, heads, ...]
    if rows.shape[1] != num_heads:
        groups = num_heads // rows.shape[1]
        rows = rows.unflatten(0, (-1, groups)).transpose(1, 2).flatten(1, 2)  # [R, H, ...]
    if prefix.rows is None:
        return rows.unflatten(0, (batch, seq)).transpose(1, 2)
    full = rows.new_full((batch, seq, *rows.shape[1:]), fill)
    full[prefix.rows] = rows
    return full.transpose(1, 2)


def _fold_heads(args: AttentionArgs) -> int:
    decode = args.q.shape[2] <= FOLD_GROUP_UP_TO and args.q.shape[0] > 1
    return args.prefix_k.shape[-3] if decode else args.q.shape[1]


def fwd(args: AttentionArgs) -> tuple[Tensor, Tensor]:
    """``o [B, H, S, D_v]`` and ``lse [B, H, S]`` of the merged softmax."""
    state: tuple[Tensor, Tensor] | None = None
    for part in _parts(args):
        k, v = args.k[:, :, part.first : part.last], args.v[:, :, part.first : part.last]
        other = vendor.fwd(args.q, k, v, part.causal, part.mask, args.scale)
        state = other if state is None else merge(*state, *other)
    heads = _fold_heads(args)
    for prefix in _prefixes(args):
        o, lse = vendor.fwd(_fold(args.q, prefix, heads), prefix.k[None], prefix.v[None], False, None, args.scale)
        other = (_unfold(o, args.q, prefix, 0.0), _unfold(lse, args.q, prefix, float("-inf")))
        state = other if state is None else merge(*state, *other)
    if state is None:
        batch, num_heads, seq = args.q.shape[:3]
        o = args.q.new_zeros(batch, seq, num_heads, args.v.shape[-1]).transpose(1, 2)
        lse = args.q.new_full((batch, num_heads, seq), float("-inf"), dtype=_mask_dtype(args))
    else:
        o, lse = state
    if args.sinks is not None:
        return add_sink(o, lse, args.sinks)
    if _may_be_empty(args):
        o = o.masked_fill((lse == float("-inf")).unsqueeze(-1), 0.0)
    return o, lse


def _may_be_empty(args: AttentionArgs) -> bool:
    """Whether a row could see no key at all."""
    if args.prefix_ids is None and args.num_prefix_tokens:
        return False
    return any(part.mask is not None for part in _parts(args))


def bwd(args: AttentionArgs, o: Tensor, lse: Tensor, do: Tensor, needs: Needs) -> Grads:
    """Gradients of :func:`fwd`; a part that nothing needs is not launched."""
    # exp(score - lse) must vanish, not overflow, in a row that saw nothing.
    lse = lse.masked_fill(lse == float("-inf"), 0.0)
    dq, dk, dv = _content_bwd(args, o, lse, do) if needs.content else (None, None, None)
    dprefix_k, dprefix_v = None, None
    if needs.prefix:
        part_dq, dprefix_k, dprefix_v = _prefix_bwd(args, o, lse, do)
        if needs.q and part_dq is not None:
            dq = part_dq if dq is None else dq.add_(part_dq)
    if needs.q and dq is None:
        dq = torch.zeros_like(args.q)
    return Grads(
        q=dq if needs.q else None,
        k=dk if needs.k else None,
        v=dv if needs.v else None,
        prefix_k=dprefix_k if needs.prefix_k else None,
        prefix_v=dprefix_v if needs.prefix_v else None,
    )


def _content_bwd(args: AttentionArgs, o: Tensor, lse: Tensor, do: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
    """dq of the content parts, and dK, dV of every key: 0 for those that no row sees."""
    dq: Tensor | None = None
    grads: list[tuple[Tensor, Tensor]] = []
    covered = 0
    for part in _parts(args):
        k, v = args.k[:, :, part.first : part.last], args.v[:, :, part.first : part.last]
        part_dq, dk, dv = vendor.bwd(do, args.q, k, v, o, lse, part.causal, part.mask, args.scale)
        dq = part_dq if dq is None else dq.add_(part_dq)
        grads.append((dk, dv))
        covered = part.last
    if covered < args.k.shape[2]:
        grads.append((torch.zeros_like(args.k[:, :, covered:]), torch.zeros_like(args.v[:, :, covered:])))
    if not grads:
        return None, torch.zeros_like(args.k), torch.zeros_like(args.v)
    if len(grads) == 1:
        return dq, *grads[0]
    dk, dv = (torch.cat(x, dim=2) for x in zip(*grads, strict=True))
    return dq, dk, dv


def _prefix_bwd(args: AttentionArgs, o: Tensor, lse: Tensor, do: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
    """dq of the prefix part, and dPrefix summed over batch, rows and the heads of a group."""
    dq: Tensor | None = None
    dprefix_k, dprefix_v = torch.zeros_like(args.prefix_k), torch.zeros_like(args.prefix_v)
    heads = _fold_heads(args)
    for prefix in _prefixes(args):
        q, do_, o_ = (_fold(x, prefix, heads) for x in (args.q, do, o))
        lse_ = _fold(lse.unsqueeze(-1), prefix, heads).squeeze(-1)
        part_dq, part_dk, part_dv = vendor.bwd(
            do_, q, prefix.k[None], prefix.v[None], o_, lse_, False, None, args.scale
        )
        full = _unfold(part_dq, args.q, prefix, 0.0)
        dq = full if dq is None else dq.add_(full)
        for out, grad in ((dprefix_k, part_dk[0]), (dprefix_v, part_dv[0])):
            target = out if prefix.number is None else out[prefix.number]
            target[:, : grad.shape[1]] = grad
    return dq, dprefix_k, dprefix_v
