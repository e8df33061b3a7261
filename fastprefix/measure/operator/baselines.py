"""The implementations that fastprefix is compared with: they compute the same call from the same :class:`Leaves`.

Work that a model does once for all layers (making the mask) is not timed; work that every layer repeats (concatenating
the prefix) is. In decoding, a baseline's cache already holds a copy of the prefix for every sample.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa

from fastprefix.measure.operator.problem import Leaves, Mode, Problem

Attend = Callable[[], Tensor]  # -> o [B, H, S, D]
NO_PREFIX = "content_only"
FA, FA3, FA4 = "flash_attn", "flash_attn_interface", "flash_attn.cute"  # modules of FlashAttention-2, -3 and -4


@dataclass(frozen=True)
class Candidate:
    """One implementation of the operator that can be timed: ours, or a baseline.

    Attributes:
        name: in tables, and for ``--peer``.
        about: what it is, in words.
        prepare: ``prepare(problem, leaves)`` returns the function to time.
        unavailable: ``unavailable(problem, mode)`` says why it cannot run here; None where it can.
        exact: False where it computes another problem on purpose, as the call without a prefix does.
    """

    name: str
    about: str
    prepare: Callable[[Problem, Leaves], Attend]
    unavailable: Callable[[Problem, Mode], str | None]
    exact: bool = True


def visible_mask(problem: Problem) -> Tensor:
    """The dense mask over ``[prefix ; content]``: ``[S, P + T]`` bool, True where a query attends to a key."""
    mask = torch.ones(problem.S, problem.P + problem.T, dtype=torch.bool, device=problem.device)
    return mask.tril(problem.P + problem.T - problem.S) if problem.causal else mask


def _always(problem: Problem, mode: Mode) -> str | None:
    return None


def _repeat(x: Tensor, groups: int) -> Tensor:
    """Repeat keys or values for all query heads, as transformers does where there is a mask: ``[B, H, T, D]``."""
    return x if groups == 1 else x[:, :, None].expand(-1, -1, groups, -1, -1).flatten(1, 2)


def _cat_mask(problem: Problem, x: Leaves) -> Attend:
    mask = visible_mask(problem).expand(problem.B, 1, -1, -1).contiguous()

    def attend() -> Tensor:
        keys, values = (_repeat(t, problem.groups) for t in x.concatenated())
        return sdpa(x.q, keys, values, attn_mask=mask)

    return attend


def _lower_right(rows: int, keys: int) -> Tensor:
    from torch.nn.attention.bias import causal_lower_right  # imports dynamo: a second that only this needs

    bias: Tensor = causal_lower_right(rows, keys)
    return bias


def _cat_sdpa(problem: Problem, x: Leaves) -> Attend:
    bias = _lower_right(problem.S, problem.P + problem.T) if problem.causal else None
    return lambda: sdpa(x.q, *x.concatenated(), attn_mask=bias, enable_gqa=problem.groups > 1)


def _cat_cudnn(problem: Problem, x: Leaves) -> Attend:
    # cuDNN's causal flag aligns at the top left, which would hide part of the prefix, so it needs a mask.
    mask = visible_mask(problem)[None, None] if problem.causal else None

    def attend() -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return sdpa(x.q, *x.concatenated(), attn_mask=mask, enable_gqa=problem.groups > 1)

    return attend


def _cat_fa(module: str) -> Callable[[Problem, Leaves], Attend]:
    def prepare(problem: Problem, x: Leaves) -> Attend:
        attention = importlib.import_module(module).flash_attn_func

        def attend() -> Tensor:
            keys, values = x.concatenated()
            return _bhsd(attention(*(t.transpose(1, 2) for t in (x.q, keys, values)), causal=problem.causal))

        return attend

    return prepare


def _bhsd(o: Any) -> Tensor:
    """FlashAttention's output ``[B, S, H, D]``, with the lse in some versions, as ``[B, H, S, D]``."""
    x: Tensor = o[0] if isinstance(o, tuple) else o
    return x.transpose(1, 2)


def _flex(problem: Problem, x: Leaves) -> Attend:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    P, first = problem.P, problem.T - problem.S

    def mask_mod(b: Tensor, h: Tensor, row: Tensor, key: Tensor) -> Tensor:
        return (key < P) | (key - P <= row + first)

    mask = None
    if problem.causal:
        mask = create_block_mask(mask_mod, None, None, problem.S, P + problem.T, device=problem.device)
    # Every shape is compiled; after its limit of compilations torch would run uncompiled, which is no fair baseline.
    torch.compiler.reset()
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(x.q, *x.concatenated(), block_mask=mask, enable_gqa=problem.groups > 1)


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


def _cache_cudnn(problem: Problem, x: Leaves) -> Attend:
    def attend() -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return sdpa(x.q, *x.cache, enable_gqa=problem.groups > 1)

    return attend


def _cache_flex(problem: Problem, x: Leaves) -> Attend:
    from torch.nn.attention.flex_attention import flex_attention

    torch.compiler.reset()
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(x.q, *x.cache, enable_gqa=problem.groups > 1)


def _cache_fa(module: str) -> Callable[[Problem, Leaves], Attend]:
    def prepare(problem: Problem, x: Leaves) -> Attend:
        attention = importlib.import_module(module).flash_attn_with_kvcache
        keys, values = (t.transpose(1, 2).contiguous() for t in x.cache)
        return lambda: _bhsd(attention(x.q.transpose(1, 2), keys, values))

    return prepare


def _cache_fa4(problem: Problem, x: Leaves) -> Attend:
    """FlashAttention-4 has no call of its own for a cache: one query token sees all keys."""
    attention = importlib.import_module(FA4).flash_attn_func
    keys, values = (t.transpose(1, 2).contiguous() for t in x.cache)
    return lambda: _bhsd(attention(x.q.transpose(1, 2), keys, values))


def _no_cuda(problem: Problem, mode: Mode) -> str | None:
    if torch.device(problem.device).type != "cuda":
        return "needs a CUDA device"
    return None if problem.dtype.itemsize == 2 else f"takes fp16 and bf16, not {problem.dtype_name}"


def _no_fa(module: str) -> Callable[[Problem, Mode], str | None]:
    def reason(problem: Problem, mode: Mode) -> str | None:
        try:
            found = importlib.util.find_spec(module)  # which imports the package of a submodule
        except ImportError:
            found = None
        if found is None:
            return f"{module} is not installed"
        return _no_cuda(problem, mode)

    return reason


def _no_flex(problem: Problem, mode: Mode) -> str | None:
    if torch.device(problem.device).type == "cuda":
        return None if problem.D >= 16 else "head dim below 16"
    if mode in ("backward", "lowest"):
        return "FlexAttention has no backward on the CPU"
    return None if problem.dtype != torch.float64 else "no fp64"


TRAIN_BASELINES = (
    Candidate("cat_mask", "cat, K and V repeated to all heads, dense mask: PEFT as shipped", _cat_mask, _always),
    Candidate("cat_sdpa", "cat and SDPA with a lower-right causal bias", _cat_sdpa, _always),
    Candidate("cat_cudnn", "cat and cuDNN attention with a dense mask", _cat_cudnn, _no_cuda),
    Candidate("cat_fa", "cat and FlashAttention-2", _cat_fa(FA), _no_fa(FA)),
    Candidate("cat_fa3", "cat and FlashAttention-3", _cat_fa(FA3), _no_fa(FA3)),
    Candidate("cat_fa4", "cat and FlashAttention-4", _cat_fa(FA4), _no_fa(FA4)),
    Candidate("flex", "cat and compiled FlexAttention, the prefix in its block mask", _flex, _no_flex),
    Candidate(NO_PREFIX, "no prefix at all: SDPA, is_causal", _content_only, _always, exact=False),
)
DECODE_BASELINES = (
    Candidate("cache_sdpa", "SDPA with native GQA, the prefix in every sample's cache", _cache_sdpa, _always),
    Candidate("cache_packed", "the same, a group's heads packed as rows", _cache_packed, _always),
    Candidate("cache_cudnn", "cuDNN attention, the prefix in every sample's cache", _cache_cudnn, _no_cuda),
    Candidate("cache_fa", "FlashAttention-2, the prefix in every sample's cache", _cache_fa(FA), _no_fa(FA)),
    Candidate("cache_fa3", "FlashAttention-3, the prefix in every sample's cache", _cache_fa(FA3), _no_fa(FA3)),
    Candidate("cache_fa4", "FlashAttention-4, the prefix in every sample's cache", _cache_fa4, _no_fa(FA4)),
    Candidate("flex", "compiled FlexAttention, the prefix in every sample's cache", _cache_flex, _no_cuda),
    Candidate(NO_PREFIX, "no prefix at all: SDPA", _content_only, _always, exact=False),
)
