"""Calls that together use every argument of the operator, on shapes of hundreds of rows.

Dropout is not among them: each backend drops other entries, so their results cannot be compared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastprefix.measure import Leaves, Problem
from fastprefix.measure.operator.problem import random_normal

Options = dict[str, Any]
Make = Callable[[Problem, torch.Generator], Options]


@dataclass(frozen=True)
class Call:
    """A problem, a function that makes the call's options, and how its inputs differ from the problem's usual ones.

    Attributes:
        bank: number of prefixes in a bank; 0 for one prefix that all rows share.
        packed: whether the prefixes are concatenated, with the lengths ``prefix_lens`` of the options.
        width: D_v if it differs from D.
        master: whether the prefix is in fp32, whatever the dtype of the model.
    """

    problem: Problem
    make: Make
    bank: int = 0
    packed: bool = False
    width: int | None = None
    master: bool = False

    def build(self, seed: int = 0) -> tuple[Leaves, Options]:
        """Inputs that all require gradients, and the options."""
        x = self.problem
        generator = torch.Generator(x.device).manual_seed(seed + 1)

        def normal(*shape: int, dtype: torch.dtype = x.dtype) -> Tensor:
            return random_normal(x, generator, *shape, dtype=dtype).requires_grad_()

        leaves = Leaves.random(x, seed, requires_grad=True)
        options = self.make(x, generator)
        width, lead = self.width or x.D, (self.bank,) if self.bank and not self.packed else ()
        tokens = int(options["prefix_lens"].sum()) if self.packed else x.P
        if self.width:
            v, do = (normal(x.B, n, h, width).detach().transpose(1, 2) for n, h in ((x.T, x.H_kv), (x.S, x.H)))
            leaves = replace(leaves, v=v.requires_grad_(), do=do)
        if self.width or self.bank or self.master:
            dtype = torch.float32 if self.master else x.dtype
            prefix = (normal(*lead, x.H_kv, tokens, dim, dtype=dtype) for dim in (x.D, width))
            leaves = replace(leaves, **dict(zip(("prefix_k", "prefix_v"), prefix, strict=True)))
        return leaves, options

    def small(self) -> Call:
        """The same call on a few rows of two samples, with two query heads on one key/value head."""
        x = self.problem
        keys = 9 if x.S == x.T else 11
        rows = min(x.S, 3) if x.S < x.T else keys
        tiny = replace(x, B=2, H=2, H_kv=1, S=rows, T=keys, P=min(x.P, 5), D=16)
        return replace(self, problem=tiny, width=self.width and 24)


def padding(x: Problem, side: str) -> Tensor:
    """A padding mask ``[B, T]`` bool: the first sample keeps one token, the last all of them."""
    kept = torch.linspace(1, x.T, x.B, device=x.device).long()
    column = torch.arange(x.T, device=x.device)
    place = column.flip(0) if side == "left" else column
    return place < kept[:, None]


def _nothing_left(x: Problem, generator: torch.Generator) -> Options:
    mask = padding(x, "right")
    mask[0] = False
    return {"key_padding_mask": mask}


def _documents(x: Problem, generator: torch.Generator) -> Options:
    """Packed documents of different lengths, which also differ between samples."""
    column = torch.arange(x.T, device=x.device)
    lengths = torch.arange(x.B, device=x.device)[:, None] * 3 + max(2, x.T // 4)
    return {"segment_ids": column // lengths}


def _ids(x: Problem, generator: torch.Generator, *shape: int, most: int = 3) -> Tensor:
    ids = torch.randint(-1, most, shape, generator=generator, device=x.device)
    ids.view(-1)[0] = most - 1
    return ids


def _lens(x: Problem) -> Tensor:
    """Prefix lengths of a bank: the first prefix is whole, the second empty, the third halved."""
    return torch.tensor([x.P, 0, max(1, x.P // 2)], device=x.device)


def _biased(x: Problem, generator: torch.Generator) -> Options:
    """ALiBi's slopes as a bias in which one key in sixteen is hidden, as transformers writes it."""
    distance = torch.arange(x.T, device=x.device) - torch.arange(x.T - x.S, x.T, device=x.device)[:, None]
    slopes = 0.5 ** torch.arange(1, x.H + 1, device=x.device)
    bias = (slopes[:, None, None] * distance).to(x.dtype)
    hidden = torch.rand(x.S, x.T, generator=generator, device=x.device) < 1 / 16
    return {"bias": bias.masked_fill(hidden, float("-inf") if x.dtype == torch.float16 else torch.finfo(x.dtype).min)}


def _everything(x: Problem, generator: torch.Generator) -> Options:
    return {
        "scale": 0.2,
        "key_padding_mask": padding(x, "left"),
        **_documents(x, generator),
        "window": max(2, x.T // 3),
        "softcap": 20.0,
        "sinks": random_normal(x, generator, x.H).requires_grad_(),
        "bias": random_normal(x, generator, x.H, 1, x.T),
        "prefix_ids": _ids(x, generator, x.B),
        "prefix_lens": _lens(x),
    }


_ROWS = Problem.train(3, 8, 2, 257, 40, 64)
_WIDE = Problem.train(2, 8, 2, 300, 130, 128)
_CACHED = Problem(B=3, H=8, H_kv=2, S=65, T=320, P=40, D=64)
_BOTH = replace(_ROWS, causal=False)
_DECODE = Problem.decode(16, 8, 2, 1100, 1000, 128)  # enough keys to be split over programs, of the prefix alone too

CALLS: dict[str, Call] = {
    "padding left": Call(_ROWS, lambda x, g: {"key_padding_mask": padding(x, "left")}),
    "padding right, bidirectional": Call(_BOTH, lambda x, g: {"key_padding_mask": padding(x, "right")}),
    "padding, rows without a key": Call(replace(_ROWS, P=0), _nothing_left),
    "segments": Call(_ROWS, _documents),
    "window": Call(_WIDE, lambda x, g: {"window": max(2, x.T // 5)}),
    "window with a cache": Call(_CACHED, lambda x, g: {"window": max(2, x.T // 5)}),
    "softcap": Call(_WIDE, lambda x, g: {"softcap": 2.0}),
    "sinks": Call(_ROWS, lambda x, g: {"sinks": random_normal(x, g, x.H).requires_grad_()}),
    "bias": Call(_ROWS, _biased),
    "bias bool": Call(_BOTH, lambda x, g: {"bias": torch.rand(x.B, 1, x.S, x.T, generator=g, device=x.device) > 0.3}),
    "prefix_bias": Call(_ROWS, lambda x, g: {"prefix_bias": random_normal(x, g, x.H_kv, x.P).requires_grad_()}),
    "gate": Call(_ROWS, lambda x, g: {"gate": random_normal(x, g, x.H).requires_grad_()}),
    "scale, fp32 prefix": Call(_ROWS, lambda x, g: {"scale": 0.1}, master=True),
    "D_v smaller": Call(replace(_ROWS, H=4, H_kv=4, D=128), lambda x, g: {}, width=64),
    "D_v larger": Call(_ROWS, lambda x, g: {}, width=128),
    "q_start": Call(_CACHED, lambda x, g: {"q_start": x.T // 3}),
    "q_start of each sample": Call(
        _CACHED, lambda x, g: {"q_start": torch.randint(0, x.T - x.S, (x.B,), generator=g, device=x.device)}
    ),
    "bank": Call(replace(_ROWS, B=5), lambda x, g: {"prefix_ids": _ids(x, g, x.B)}, bank=3),
    "bank ragged": Call(
        replace(_ROWS, B=5), lambda x, g: {"prefix_ids": _ids(x, g, x.B), "prefix_lens": _lens(x)}, bank=3
    ),
    "bank packed": Call(
        replace(_ROWS, B=5),
        lambda x, g: {"prefix_ids": _ids(x, g, x.B), "prefix_lens": _lens(x)},
        bank=3,
        packed=True,
        master=True,
    ),
    "bank by row": Call(_ROWS, lambda x, g: {"prefix_ids": _ids(x, g, x.B, x.S), "prefix_lens": _lens(x)}, bank=3),
    "decode, padding": Call(_DECODE, lambda x, g: {"key_padding_mask": padding(x, "left")}),
    "decode, static cache": Call(
        _DECODE, lambda x, g: {"q_start": torch.randint(0, x.T, (x.B,), generator=g, device=x.device)}
    ),
    "decode, bank": Call(_DECODE, lambda x, g: {"prefix_ids": _ids(x, g, x.B), "prefix_lens": _lens(x)}, bank=3),
    "decode, window and sinks": Call(
        _DECODE, lambda x, g: {"window": max(2, x.T // 5), "sinks": random_normal(x, g, x.H).requires_grad_()}
    ),
    "everything": Call(_CACHED, _everything, bank=3),
}
