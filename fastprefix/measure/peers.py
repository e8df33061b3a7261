"""Who fastprefix is measured against, one operator call each, all from the same :class:`Leaves`.

A peer gets what it could prepare once for all layers (its mask) outside the time, and pays inside it for what
every layer has to do (the concatenation). In decoding its cache already holds the prefix of every sample.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa

from fastprefix import dispatch
from fastprefix.functional import prefix_attention
from fastprefix.measure.problem import Leaves, Mode, Problem
from fastprefix.types import BACKENDS, AttentionArgs, BackendName

Attend = Callable[[], Tensor]  # -> o [B, H, S, D]
OURS = "ours"
FLOOR = "content_only"


@dataclass(frozen=True)
class Peer:
    """A way to compute a problem.

    ``prepare(problem, leaves)`` returns what is timed. ``unavailable(problem, mode)`` says why it cannot
    run here, or None. ``exact`` is False for what computes another problem on purpose.
    """

    name: str
    about: str
    prepare: Callable[[Problem, Leaves], Attend]
    unavailable: Callable[[Problem, Mode], str | None]
    exact: bool = True


def peers_for(problem: Problem, mode: Mode) -> list[Peer]:
    """Ours first, as ``auto`` and by the name of every other backend that has no reasons, then all others.

    The reference is an oracle, not a contender: it is among ours only where ``auto`` takes it.
    """
    return [*_ours(problem), *(DECODE_PEERS if mode == "decode" else TRAIN_PEERS)]


def chosen_backend(problem: Problem) -> BackendName:
    """What ``auto`` takes for a problem; FASTPREFIX_BACKEND overrules it as it does in ``prefix_attention``."""
    named = os.environ.get("FASTPREFIX_BACKEND", "auto")
    for name in BACKENDS:
        if name == named:
            return name
    order = dispatch.auto_order(torch.device(problem.device).type)
    return next(name for name in order if not backend_reasons(problem, name))


def backend_reasons(problem: Problem, name: BackendName) -> list[str]:
    """Why a backend cannot take the problem; empty when it can."""
    try:
        reasons: list[str] = dispatch.module(name).unsupported(_args(problem))
    except ImportError as error:
        return [f"cannot be imported: {error}"]
    return reasons


def attend_with(backend: str) -> Callable[[Problem, Leaves], Attend]:
    """``prepare`` of ``prefix_attention`` with a backend's name or ``auto``."""

    def prepare(problem: Problem, x: Leaves) -> Attend:
        causal = problem.causal
        return lambda: prefix_attention(x.q, x.k, x.v, x.prefix_k, x.prefix_v, causal=causal, backend=backend)

    return prepare


def visible(problem: Problem) -> Tensor:
    """The dense mask over ``[prefix ; content]``: ``[S, P + T]`` bool, True = attend."""
    mask = torch.ones(problem.S, problem.P + problem.T, dtype=torch.bool, device=problem.device)
    return mask.tril(problem.P + problem.T - problem.S) if problem.causal else mask


def _args(problem: Problem) -> AttentionArgs:
    x, place = problem, {"dtype": problem.dtype, "device": problem.device}
    q = torch.empty(x.B, x.S, x.H, x.D, **place).transpose(1, 2)  # type: ignore[call-overload]
    k = torch.empty(x.B, x.T, x.H_kv, x.D, **place).transpose(1, 2)  # type: ignore[call-overload]
    prefix = torch.empty(x.H_kv, x.P, x.D, **place)  # type: ignore[call-overload]
    return AttentionArgs(q, k, k, prefix, prefix, scale=x.D**-0.5, causal=x.causal)


def _always(problem: Problem, mode: Mode) -> str | None:
    return None


def _ours(problem: Problem) -> list[Peer]:
    chosen = chosen_backend(problem)
    found = [Peer(OURS, f"prefix_attention, auto takes {chosen}", attend_with("auto"), _always)]
    for name in BACKENDS:
        if name not in (chosen, "reference") and not backend_reasons(problem, name):
            found.append(Peer(f"{OURS}:{name}", f"prefix_attention by {name}", attend_with(name), _always))
    return found


def _repeat(x: Tensor, groups: int) -> Tensor:
    """What transformers does to keys and values when there is a mask."""
    return x if groups == 1 else x[:, :, None].expand(-1, -1, groups, -1, -1).flatten(1, 2)


def _cat_mask(problem: Problem, x: Leaves) -> Attend:
    mask = visible(problem).expand(problem.B, 1, -1, -1).contiguous()

    def attend() -> Tensor:
        keys, values = (_repeat(t, problem.groups) for t in x.joined())
        return sdpa(x.q, keys, values, attn_mask=mask)

    return attend


def _lower_right(rows: int, keys: int) -> Tensor:
    from torch.nn.attention.bias import causal_lower_right  # imports dynamo: a second that only this needs

    bias: Tensor = causal_lower_right(rows, keys)
    return bias


def _cat_sdpa(problem: Problem, x: Leaves) -> Attend:
    bias = _lower_right(problem.S, problem.P + problem.T) if problem.causal else None
    return lambda: sdpa(x.q, *x.joined(), attn_mask=bias, enable_gqa=problem.groups > 1)


def _cat_cudnn(problem: Problem, x: Leaves) -> Attend:
    # Its causal flag aligns at the top left, which would hide part of the prefix: a mask it has to be.
    mask = visible(problem)[None, None] if problem.causal else None

    def attend() -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return sdpa(x.q, *x.joined(), attn_mask=mask, enable_gqa=problem.groups > 1)

    return attend


def _cat_fa(problem: Problem, x: Leaves) -> Attend:
    attention = importlib.import_module("flash_attn").flash_attn_func

    def attend() -> Tensor:
        keys, values = x.joined()
        o: Tensor = attention(*(t.transpose(1, 2) for t in (x.q, keys, values)), causal=problem.causal)
        return o.transpose(1, 2)

    return attend


def _flex(problem: Problem, x: Leaves) -> Attend:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    P, first = problem.P, problem.T - problem.S

    def mask_mod(b: Tensor, h: Tensor, row: Tensor, key: Tensor) -> Tensor:
        return (key < P) | (key - P <= row + first)

    mask = None
    if problem.causal:
        mask = create_block_mask(mask_mod, None, None, problem.S, P + problem.T, device=problem.device)
    # Every shape is a compilation of its own; past the limit torch would run uncompiled, which is no peer.
    torch.compiler.reset()
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(x.q, *x.joined(), block_mask=mask, enable_gqa=problem.groups > 1)


def _content_only(problem: Problem, x: Leaves) -> Attend:
    whole = problem.S == 1 or not problem.causal
    bias = None if whole or problem.S == problem.T else _lower_right(problem.S, problem.T)
    plain = not whole and bias is None
    return lambda: sdpa(x.q, x.k, x.v, attn_mask=bias, is_causal=plain, enable_gqa=problem.groups > 1)


def _cache_sdpa(problem: Problem, x: Leaves) -> Attend:
    return lambda: sdpa(x.q, *x.cache, enable_gqa=problem.groups > 1)


def _cache_packed(problem: Problem, x: Leaves) -> Attend:
    B, H, D = problem.B, problem.H, problem.D
    return lambda: sdpa(x.q.reshape(B, problem.H_kv, -1, D), *x.cache).reshape(B, H, 1, D)


def _cache_fa(problem: Problem, x: Leaves) -> Attend:
    attention = importlib.import_module("flash_attn").flash_attn_with_kvcache
    keys, values = (t.transpose(1, 2).contiguous() for t in x.cache)

    def attend() -> Tensor:
        o: Tensor = attention(x.q.transpose(1, 2), keys, values)
        return o.transpose(1, 2)

    return attend


def _no_cuda(problem: Problem, mode: Mode) -> str | None:
    if torch.device(problem.device).type != "cuda":
        return "needs a CUDA device"
    return None if problem.dtype.itemsize == 2 else f"takes fp16 and bf16, not {problem.dtype_name}"


def _no_flash_attn(problem: Problem, mode: Mode) -> str | None:
    if importlib.util.find_spec("flash_attn") is None:
        return "flash_attn is not installed"
    return _no_cuda(problem, mode)


def _no_flex(problem: Problem, mode: Mode) -> str | None:
    if torch.device(problem.device).type == "cuda":
        return None if problem.D >= 16 else "head dim below 16"
    if mode == "backward":
        return "FlexAttention has no backward on the CPU"
    return None if problem.dtype != torch.float64 else "no fp64"


TRAIN_PEERS = (
    Peer("cat_mask", "cat, K and V repeated to all heads, dense mask: PEFT as shipped", _cat_mask, _always),
    Peer("cat_sdpa", "cat and SDPA with a lower-right causal bias", _cat_sdpa, _always),
    Peer("cat_cudnn", "cat and cuDNN attention with a dense mask", _cat_cudnn, _no_cuda),
    Peer("cat_fa", "cat and flash_attn_func", _cat_fa, _no_flash_attn),
    Peer("flex", "cat and compiled FlexAttention, the prefix in its block mask", _flex, _no_flex),
    Peer(FLOOR, "no prefix at all: SDPA, is_causal", _content_only, _always, exact=False),
)
DECODE_PEERS = (
    Peer("cache_sdpa", "SDPA with native GQA, the prefix in every sample's cache", _cache_sdpa, _always),
    Peer("cache_packed", "the same, a group's heads packed as rows", _cache_packed, _always),
    Peer("cache_fa", "flash_attn_with_kvcache, the prefix in each sample's cache", _cache_fa, _no_flash_attn),
    Peer(FLOOR, "no prefix at all: SDPA", _content_only, _always, exact=False),
)
