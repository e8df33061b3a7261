"""Prefixes made of other prefixes: behind each other, averaged, or a part of their tokens.

Each function takes attached prefixes, soft prompts or starts (``Init``) with given numbers, and returns a start for a
new one: ``attach(model, PrefixConfig(init=init.concat(a, b)))``. The numbers are copied: the old may go on training.

Keys are taken as they are. Where a model has rotary positions, a prefix's keys stay rotated as they were trained, while
the content begins after all tokens of the new prefix: composition as in Cartridges (Eyuboglu et al. 2025, 2506.06266).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastprefix.errors import fail
from fastprefix.prefixes.head_shards import whole
from fastprefix.prefixes.init import Init
from fastprefix.prefixes.prefix import Prefix
from fastprefix.prefixes.prompt import SoftPrompt
from fastprefix.validation import is_int

Operand = Prefix | SoftPrompt | Init


def concat(*prefixes: Operand) -> Init:
    """The tokens of two or more prefixes behind each other, in this order.

    Raises:
        ValueError: fewer than two are given, or they do not fit together: soft prompts with prefixes, other layers,
            heads or dimensions.
    """
    return _merge(_several(prefixes), lambda parts: torch.cat(list(parts), -2), "concat", same_length=False)


def average(*prefixes: Operand, weights: Sequence[float] | None = None) -> Init:
    """The weighted mean of two or more prefixes of as many tokens, number by number.

    Args:
        weights: one for each prefix, which are divided by their sum; None weighs all alike.

    Raises:
        ValueError: as :func:`concat`, or the numbers of tokens differ, or the weights' number, or their sum is 0.
    """
    starts = _several(prefixes)
    given = [1.0] * len(starts) if weights is None else list(weights)
    numbers = all(isinstance(weight, int | float) for weight in given)
    if not numbers or len(given) != len(starts) or not 0.0 < abs(sum(given)) < float("inf"):
        raise fail("weights", given, f"{len(starts)} numbers whose sum is not 0")
    shares = [weight / sum(given) for weight in given]

    def mean(parts: Sequence[Tensor]) -> Tensor:
        return (
            torch.stack([share * x.double() for share, x in zip(shares, parts, strict=True)]).sum(0).to(parts[0].dtype)
        )

    return _merge(starts, mean, "average", same_length=True)


def slice(prefix: Operand, start: int | None = None, stop: int | None = None) -> Init:
    """Tokens ``start`` to ``stop`` (not included) of a prefix, counted as Python counts a list's elements.

    Raises:
        ValueError: no token is left.
    """
    source = _start(prefix)
    for name, place in (("start", start), ("stop", stop)):
        if place is not None and not is_int(place):
            raise fail(name, repr(place), "an int or None")
    kept = list(range(_length(source)))[start:stop]
    if not kept:
        raise fail("start and stop", f"{start} and {stop}", f"at least one of the prefix's {_length(source)} tokens")
    return _merge([source], lambda parts: parts[0][..., kept, :], "slice", same_length=True)


def drop(prefix: Operand, tokens: int | Sequence[int]) -> Init:
    """A prefix without some of its tokens, such as those that no row attends to.

    Args:
        tokens: their places in the prefix; negative ones count from its end.

    Raises:
        ValueError: a place is none of the prefix's, or no token is left.
    """
    source = _start(prefix)
    length = _length(source)
    places = [tokens] if isinstance(tokens, int) else list(tokens)
    if not places or not all(is_int(place) and -length <= place < length for place in places):
        raise fail("tokens", places, f"places in {-length}..{length - 1}, at least one")
    dropped = {place % length for place in places}
    kept = [place for place in range(length) if place not in dropped]
    if not kept:
        raise fail("tokens", f"all {length}", "fewer, so that one is left")
    return _merge([source], lambda parts: parts[0][..., kept, :], "drop", same_length=True)


def _several(prefixes: Sequence[Operand]) -> list[Init]:
    if len(prefixes) < 2:
        raise fail("prefixes", f"{len(prefixes)}", "at least two")
    return [_start(prefix) for prefix in prefixes]


@torch.no_grad()
def _start(prefix: Any) -> Init:
    """The numbers of a prefix."""
    if isinstance(prefix, Prefix):
        if prefix.is_added:
            raise fail("prefixes", f"a {prefix.kind}", "prefixes of keys and values without a gate")
        pairs = prefix.key_values()
        keys, values = (tuple(whole(x) for x in part) for part in zip(*pairs, strict=True))
        biases = prefix.biases()
        return Init("kv", keys=keys, values=values, biases=None if biases is None else tuple(map(whole, biases)))
    if isinstance(prefix, SoftPrompt):
        return Init("embeddings", embeddings=prefix.without_dropout())
    if isinstance(prefix, Init) and (prefix.keys is not None or prefix.embeddings is not None):
        return prefix
    got = f"init.{prefix.name}" if isinstance(prefix, Init) else type(prefix).__name__
    raise fail("prefixes", got, "what attach returns, or an init of given numbers: init.kv, embeddings, concat ...")


def _tensors(start: Init) -> list[Tensor]:
    if start.embeddings is not None:
        return [start.embeddings]
    assert start.keys is not None and start.values is not None
    return [*start.keys, *start.values, *(x.unsqueeze(-1) for x in start.biases or ())]


def _length(start: Init) -> int:
    length = start.length
    assert length is not None
    return length


@torch.no_grad()
def _merge(
    starts: Sequence[Init], merge: Callable[[Sequence[Tensor]], Tensor], name: str, *, same_length: bool
) -> Init:
    """A start whose every tensor ``[..., P, d]`` is made of those of others."""
    if any(start.biases is not None for start in starts):
        starts = [_with_biases(start) for start in starts]
    tensors = [_tensors(start) for start in starts]
    shapes = [[_shape(x, same_length) for x in found] for found in tensors]
    for i, found in enumerate(shapes):
        if found != shapes[0] or (starts[i].embeddings is None) != (starts[0].embeddings is None):
            raise fail(
                "prefixes", f"{_describe(starts[0])} and {_describe(starts[i])}", "prefixes of one kind and shape"
            )
    merged = [merge([x.to(parts[0].device) for x in parts]).clone() for parts in zip(*tensors, strict=True)]
    if starts[0].embeddings is not None:
        return Init(name, embeddings=merged[0])
    layers = len(starts[0].keys or ())
    biases = tuple(x.squeeze(-1) for x in merged[2 * layers :]) or None
    return Init(name, keys=tuple(merged[:layers]), values=tuple(merged[layers : 2 * layers]), biases=biases)


def _with_biases(start: Init) -> Init:
    """The same start with biases of 0 where it has none."""
    if start.keys is None or start.biases is not None:
        return start
    return replace(start, biases=tuple(k.new_zeros(k.shape[:2]) for k in start.keys))


def _shape(x: Tensor, with_length: bool) -> tuple[int, ...]:
    return tuple(x.shape) if with_length else (*x.shape[:-2], x.shape[-1])


def _describe(start: Init) -> str:
    first = _tensors(start)[0]
    if start.embeddings is not None:
        return f"a soft prompt {list(first.shape)}"
    return f"{len(start.keys or ())} layers of {list(first.shape)}"
