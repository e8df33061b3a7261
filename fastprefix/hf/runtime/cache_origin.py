"""Checks that a cache of keys and values is continued with the prefix that it was made with.

The origin is an attribute of the cache object, so that copies of the cache (``copy.deepcopy`` for several
continuations of one text) keep it.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

from torch import Tensor

from fastprefix.errors import fail
from fastprefix.hf.model.facts import ModelFacts
from fastprefix.hf.runtime.forward_context import Name
from fastprefix.hf.runtime.selection import Selection
from fastprefix.hf.runtime.warn_once import WarnOnce

_numbers = itertools.count()
_ATTRIBUTE = "_fastprefix_origin"


class Origin(NamedTuple):
    """The installation, prefixes and shared prompt that a forward reads in front of its rows."""

    installation: int  # number of the model's installation
    names: tuple[Name | None, ...]  # one name for all rows, or one for each row
    shared: int | None  # number of the open shared_prompt block
    rows: int  # batch size, with beams and returned sequences
    again: tuple[int, ...] = ()  # for each of ``names``, how many prefixes of this name were taken out before

    def __str__(self) -> str:
        names = "no prefix" if self.names == (None,) else f"prefix {self.names[0]!r}"
        if len(self.names) > 1:
            names = f"prefixes {list(self.names)}"
        if self.shared is None:
            return names
        behind = "" if self.names == (None,) else f" behind {names}"
        return f"a block of shared_prompt (number {self.shared}){behind}"

    def continues(self, other: Origin) -> bool:
        """Whether a forward of this origin may use a cache of the other: the same one, or a subset of its rows."""
        if self.installation != other.installation or self.shared != other.shared:
            return False
        mine, others = (list(zip(x.names, x.again, strict=True)) for x in (self, other))
        some = len(others) > 1 and self.rows != other.rows and set(mine) <= set(others)
        return mine == others or some


class CacheOrigins:
    """Compares each forward of one model with the origin of its cache."""

    def __init__(self, facts: ModelFacts, selection: Selection, warn: WarnOnce) -> None:
        self.facts, self.selection, self.warn = facts, selection, warn
        self.number = next(_numbers)  # number of this installation
        self.forgotten: dict[Name, int] = {}  # how many prefixes of a name were taken out

    def forget(self, name: str) -> None:
        """Keep the caches of a prefix that was taken out apart from those of a later one with its name."""
        self.forgotten[name] = self.forgotten.get(name, 0) + 1

    def _taken_out(self, name: Name | None) -> int:
        return sum(self.forgotten.get(part, 0) for part in (name if isinstance(name, tuple) else (name,)) if part)

    def of(self, kwargs: dict[str, Any]) -> Origin:
        """The origin of a forward with these keyword arguments."""
        current, shared = self.selection.current(), self.selection.shared
        names: tuple[Name | None, ...] = (None,) if current is None else current.names
        names = names[:1] if len(set(names)) == 1 else names
        inputs = [kwargs.get(name) for name in (self.facts.layers.main.main_input, "inputs_embeds")]
        rows = next((len(x) for x in inputs if isinstance(x, Tensor)), 0)  # without an input the model raises
        again = tuple(map(self._taken_out, names)) if self.forgotten else (0,) * len(names)
        return Origin(self.number, names, None if shared is None else shared.number, rows, again)

    def check(self, kwargs: dict[str, Any]) -> Origin:
        """The forward's origin, compared with that of its cache; an empty cache gets the forward's origin.

        Raises:
            ValueError: the cache was made with another prefix or shared prompt; both origins are named.
        """
        here, cache = self.of(kwargs), kwargs.get("past_key_values")
        if cache is None:
            return here
        made = getattr(cache, _ATTRIBUTE, None)
        if made == here:  # first, as a static cache's length is on its device and would have to be waited for
            return here
        if not int(cache.get_seq_length()):
            remember(cache, here)
        elif isinstance(made, Origin):
            if not here.continues(made):
                expected = f"one made with {here}, which this forward reads"
                advice = "go on with what made it, or start a new cache"
                raise fail("past_key_values", f"a cache made with {made}", f"{expected}: {advice}")
            remember(cache, here)
        elif here.names != (None,) or here.shared is not None:
            self.warn(
                "cache",
                f"fastprefix: past_key_values: a cache of unknown origin is taken to be one made with {here}; where it "
                "was made with another prefix, or with none, start a new one",
            )
            remember(cache, here)
        return here


def remember(cache: Any, origin: Origin) -> None:
    """Store an origin on a cache object."""
    setattr(cache, _ATTRIBUTE, origin)


def keep(output: Any, origin: Origin) -> None:
    """Store the origin on the cache in a forward's output, unless the cache has one."""
    cache = cache_of(output)
    if cache is not None and not isinstance(getattr(cache, _ATTRIBUTE, None), Origin):
        remember(cache, origin)


def cache_of(output: Any) -> Any:
    """The cache in a forward's output; None without one."""
    if isinstance(output, tuple):
        return next((x for x in output[1:] if hasattr(x, "get_seq_length")), None)
    return output.get("past_key_values") if hasattr(output, "get") else None
