"""A cache of keys and values belongs to what was read when it was made: it cannot go on behind another prefix.

The origin is kept on the cache object itself, so that copies of it (``copy.deepcopy`` for several continuations of one
text) keep it too.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from fastprefix.hf.runtime.prefix_reader import Name
from fastprefix.validation import fail

if TYPE_CHECKING:
    from fastprefix.hf.adapters.installation import Installation

_ATTRIBUTE = "_fastprefix_origin"


class Origin(NamedTuple):
    """What a forward reads in front of its rows."""

    installation: int  # the number of the attached model's
    names: tuple[Name | None, ...]  # one for all rows, or one for each
    shared: int | None  # the number of a block of shared_prompt
    rows: int  # of the batch, beams and returned sequences among them

    def __str__(self) -> str:
        names = "no prefix" if self.names == (None,) else f"prefix {self.names[0]!r}"
        if len(self.names) > 1:
            names = f"prefixes {list(self.names)}"
        if self.shared is None:
            return names
        behind = "" if self.names == (None,) else f" behind {names}"
        return f"a block of shared_prompt (number {self.shared}){behind}"

    def continues(self, other: Origin) -> bool:
        """Whether a forward that reads this may go on with a cache of the other: also with some of a batch's rows."""
        if self.installation != other.installation or self.shared != other.shared:
            return False
        some = len(other.names) > 1 and self.rows != other.rows and set(self.names) <= set(other.names)
        return self.names == other.names or some


def of(state: Installation, kwargs: dict[str, Any]) -> Origin:
    """What a forward of these arguments reads."""
    choice = state.choice()
    names: tuple[Name | None, ...] = (None,) if choice is None else choice.names
    names = names[:1] if len(set(names)) == 1 else names
    inputs = [kwargs.get(name) for name in (state.layers.main.main_input, "inputs_embeds")]
    rows = next((len(x) for x in inputs if isinstance(x, Tensor)), 0)  # what is missing the model itself will say
    return Origin(state.number, names, None if state.shared is None else state.shared.number, rows)


def check(state: Installation, kwargs: dict[str, Any]) -> None:
    """Hold a forward to the origin of its cache; an empty cache takes the forward's.

    Raises:
        ValueError: the cache was made behind something else; both are named.
    """
    cache = kwargs.get("past_key_values")
    if cache is None:
        return
    here, made = of(state, kwargs), getattr(cache, _ATTRIBUTE, None)
    if made == here:  # a static cache's length lies on its device: nobody waits for it in every step
        return
    if not int(cache.get_seq_length()):
        remember(cache, here)
    elif isinstance(made, Origin):
        if not here.continues(made):
            expected = f"one made with {here}, which this forward reads: go on with what made it, or start a new cache"
            raise fail("past_key_values", f"a cache made with {made}", expected)
        remember(cache, here)
    elif here.names != (None,) or here.shared is not None:
        if "cache" not in state.said:
            state.said.add("cache")
            warnings.warn(
                f"fastprefix: past_key_values: a cache of unknown origin is taken to be one made with {here}; where it "
                "was made with another prefix, or with none, start a new one",
                stacklevel=2,
            )
        remember(cache, here)


def remember(cache: Any, origin: Origin) -> None:
    """Keep a cache's origin."""
    setattr(cache, _ATTRIBUTE, origin)


def keep(output: Any, origin: Origin) -> None:
    """Keep the origin of the cache that a forward has made."""
    cache = output.get("past_key_values") if hasattr(output, "get") else None
    if isinstance(output, tuple):
        cache = next((x for x in output[1:] if hasattr(x, "get_seq_length")), None)
    if cache is not None and not isinstance(getattr(cache, _ATTRIBUTE, None), Origin):
        remember(cache, origin)
