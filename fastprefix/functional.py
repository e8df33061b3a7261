"""``prefix_attention``: attention over a shared prefix and each sample's own content, as one softmax."""

from __future__ import annotations

import math
import os
from typing import Any, Literal, overload

import torch
from torch import Tensor

from . import dispatch, validation
from .backends import native
from .calls import gates, transforms
from .types import AttentionArgs


def default_backend(backend: str) -> str:
    """``auto`` may be overruled for a whole program by FASTPREFIX_BACKEND."""
    return os.environ.get("FASTPREFIX_BACKEND", "auto") if backend == "auto" else backend


@overload
def prefix_attention(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, *, return_lse: Literal[False] = ..., **kw: Any
) -> Tensor: ...


@overload
def prefix_attention(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, *, return_lse: Literal[True], **kw: Any
) -> tuple[Tensor, Tensor]: ...


def prefix_attention(  # type: ignore[misc]  # the overloads tell the return type apart, not the options
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    key_padding_mask: Tensor | None = None,
    segment_ids: Tensor | None = None,
    q_start: int | Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    prefix_ids: Tensor | None = None,
    prefix_lens: Tensor | None = None,
    prefix_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of ``q`` over ``[prefix ; content]`` (prefix tuning, Li & Liang 2021), the prefix shared by the batch.

    Equivalent to, without the copies and with gradients for the one prefix::

        k = torch.cat([prefix_k.expand(B, -1, -1, -1), k], 2); v = ...
        o = scaled_dot_product_attention(q, k, v, attn_mask=<causal on the content, all True on the prefix>)

    Args:
        q: ``[B, H, S, D]`` fp16, bf16, fp32 or fp64, any strides.
        k, v: ``[B, H_kv, T, D]`` and ``[B, H_kv, T, D_v]`` in q's dtype; ``H % H_kv == 0``, never repeated.
        prefix_k, prefix_v: ``[H_kv, P, D]`` and ``[H_kv, P, D_v]``, always visible; with ``prefix_ids`` a bank
            ``[N, H_kv, P, D]`` or, with ``prefix_lens`` too, a packed one ``[H_kv, P, D]``: its prefixes one after
            the other, P the sum of their lengths. Any float dtype: they are read in q's and their gradients return
            in their own.
        causal: query row i sees content key j only if ``j <= q_start + i``.
        scale: multiplies ``q k^T``; default ``1 / sqrt(D)``.
        key_padding_mask: ``[B, T]`` bool, True = attend. A row without any visible key gives o = 0, lse = -inf.
            Keys and values that a mask hides, this one or any other, must be finite. A hidden nan gets the weight 0,
            and it depends on the backend whether 0 times nan is added (docs/operator.md has the table).
        segment_ids: ``[B, T]`` int, packed documents: content sees its own segment, everything sees the prefix.
        q_start: content position of the first query row; default ``T - S``. An int tensor ``[]`` or ``[B]`` serves
            static caches, where T is the capacity.
        window: a query at position p sees content keys ``p - window < j <= p``; needs ``causal``.
        softcap: scores become ``softcap * tanh(score / softcap)`` before bias and masks (Gemma 2).
        sinks: ``[H]`` extra logit of each head's softmax (gpt-oss); differentiable.
        bias: broadcastable to ``[B, H, S, T]``, added to content scores (T5, ALiBi); 0 on the prefix. Values of
            -1e37 and below, and False in a bool bias, hide the key.
        gate: ``[H]``, or ``[B, H]`` for a gate of each row; ``o = o_content + gate * o_prefix`` with two softmaxes
            (LLaMA-Adapter, Zhang et al. 2023). The backward pass computes ``o_prefix`` again and keeps nothing for it.
        prefix_ids: ``[B]`` or ``[B, S]`` int, the row's prefix in the bank, -1 = none.
        prefix_lens: ``[N]`` int, tokens of each prefix in the bank, 0 and more.
        prefix_bias: added to the scores of prefix tokens after the softcap, in ``prefix_k``'s shape without D: ``[H_kv,
            P]``, or ``[N, H_kv, P]`` of a bank (Attention Matching, arXiv:2602.16284). Any float dtype; differentiable.
            Values of -1e37 and below hide the token.
        dropout_p: probability of dropping an attention weight.
        return_lse: also return the log-sum-exp.
        backend: ``auto``, or a name: that backend or an error, never another.

    Returns:
        ``o [B, H, S, D_v]`` in q's dtype and, on request, ``lse [B, H, S]`` (natural log; fp32, fp64 for fp64) of the
        merged softmax - with ``gate``, of the content's. ``lse`` carries no gradient.

    Raises:
        ValueError: an argument does not fit; the message names it, what came and what was expected.
        UnsupportedError: the backend asked for by name has reasons against the call.
    """
    plain = gate is None and type(dropout_p) is float and dropout_p == 0.0
    found = None
    if native.attend is not None and plain and not torch.compiler.is_compiling():
        options = (causal, scale, key_padding_mask, segment_ids, q_start, window, softcap, sinks, bias)
        bank = (prefix_ids, prefix_lens, prefix_bias)
        found = native.attend(q, k, v, prefix_k, prefix_v, *options, *bank, backend, return_lse)
        if found is not None and found is not True:
            return found
    validation.check_flag("return_lse", return_lse)
    args = _checked_args(
        q,
        k,
        v,
        prefix_k,
        prefix_v,
        causal=causal,
        scale=scale,
        key_padding_mask=key_padding_mask,
        segment_ids=segment_ids,
        q_start=q_start,
        window=window,
        softcap=softcap,
        sinks=sinks,
        bias=bias,
        gate=gate,
        prefix_ids=prefix_ids,
        prefix_lens=prefix_lens,
        prefix_bias=prefix_bias,
        dropout_p=dropout_p,
        fits=found is True,
    )
    backend = default_backend(backend)
    dispatch.check_name(backend)
    if gate is None:
        o, lse = transforms.call(args, backend)
    else:
        o, lse = gates.attend(args, gate, backend)
    return (o, lse.detach()) if return_lse else o


def _checked_args(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    *,
    causal: bool,
    scale: float | None,
    key_padding_mask: Tensor | None,
    segment_ids: Tensor | None,
    q_start: int | Tensor | None,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    bias: Tensor | None,
    gate: Tensor | None,
    prefix_ids: Tensor | None,
    prefix_lens: Tensor | None,
    prefix_bias: Tensor | None,
    dropout_p: float,
    fits: bool = False,
) -> AttentionArgs:
    """Check everything, apply autocast, fill in the defaults. ``gate`` is checked only: it is applied outside.

    ``fits``: the checks, which take longer than the rest, have been made in C++.
    """
    compiling = torch.compiler.is_compiling()
    if compiling or torch._C._is_any_autocast_enabled():
        q, k, v = _autocast(q), _autocast(k), _autocast(v)
    if not fits:
        validation.check_content(q, k, v)
        validation.check_prefix(q, v, prefix_k, prefix_v, prefix_ids, prefix_lens)
        validation.check_masks(q, k, causal, key_padding_mask, segment_ids, q_start, window)
        validation.check_extras(q, k, sinks, bias, gate, softcap)
        validation.check_bank(q, prefix_k, prefix_ids, prefix_lens)
        validation.check_prefix_bias(q, prefix_k, prefix_bias)
        validation.check_scalars(scale, dropout_p)
    seed = None
    if dropout_p > 0.0:
        # Drawn from torch's generator, so that recomputation under checkpointing draws the same.
        seed = torch.randint(2**62, (), device=q.device)
    return AttentionArgs(
        q=q,
        k=k,
        v=v,
        prefix_k=prefix_k,
        prefix_v=prefix_v,
        scale=1.0 / math.sqrt(q.shape[3]) if scale is None else float(scale),
        causal=causal,
        key_padding_mask=key_padding_mask,
        segment_ids=segment_ids,
        q_start=q_start,
        window=window,
        softcap=softcap,
        sinks=sinks,
        bias=bias,
        bias_grad=bias is not None and bias.requires_grad and torch.is_grad_enabled(),
        prefix_ids=prefix_ids,
        prefix_lens=prefix_lens,
        prefix_bias=prefix_bias,
        dropout_p=dropout_p,
        dropout_seed=seed,
    )


def _autocast(x: Any) -> Any:
    """What autocast does to scaled_dot_product_attention's inputs."""
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.dtype == torch.float64:
        return x
    device = x.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return x
    return x.to(torch.get_autocast_dtype(device))


def add_gated(
    o: Tensor, q: Tensor, prefix_k: Tensor, prefix_v: Tensor, gate: Tensor, *, scale: float | None = None
) -> Tensor:
    """``o + gate * o_prefix`` of an output ``[B, H, S, D_v]`` that was computed elsewhere; the rest as its arguments.

    For layers whose content keeps an attention of its own.
    """
    nothing_k, nothing_v = (
        x.new_empty(q.shape[0], x.shape[0], 0, x.shape[2]).to(q.dtype) for x in (prefix_k, prefix_v)
    )
    args = to_args(q, nothing_k, nothing_v, prefix_k, prefix_v, causal=False, scale=scale, gate=gate)
    return gates.add(o, args, gate, default_backend("auto"))


def explain(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, **options: Any) -> str:
    """A line for each backend: whether it takes a call of :func:`prefix_attention` with these arguments, or why not."""
    if unknown := options.keys() - (prefix_attention.__kwdefaults__ or {}).keys():
        raise TypeError(f"explain: unknown arguments {sorted(unknown)}")
    dispatch.check_name(options.get("backend", "auto"))
    return dispatch.explain(to_args(q, k, v, prefix_k, prefix_v, **options))


def to_args(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, **options: Any) -> AttentionArgs:
    """The arguments of a call of :func:`prefix_attention`, checked, as backends see them, but for its gate."""
    # The defaults are those of prefix_attention, so that both speak of the same call.
    given = {**(prefix_attention.__kwdefaults__ or {}), **options}
    return _checked_args(
        q, k, v, prefix_k, prefix_v, **{n: x for n, x in given.items() if n not in ("backend", "return_lse")}
    )
