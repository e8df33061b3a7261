"""Which of PEFT's keys and values the layers of an encoder-decoder read."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence
from typing import Any

from fastprefix.prefixes.config import Part

# num_transformer_submodules of a prefix whose slots for cross-attention are read; with 2 PEFT drops them.
WITH_CROSS = 3


def decoder_slots(parts: Sequence[Part | None], count: int, cross: bool) -> list[int | None]:
    """The first of the two slots of each attention layer of an encoder-decoder, of ``count`` slots; None without any.

    PEFT's ``past_key_values`` hold four slots for a decoder's layer, two of its self-attention and two of its
    cross-attention, and start from the first slot again when all are used. ``cross``: whether cross-attention reads
    its slots; PEFT drops them. The encoder has none.
    """
    places = {"decoder": itertools.count(0, 4), "cross": itertools.count(2, 4)}
    read = {"decoder", "cross"} if cross else {"decoder"}
    return [next(places[part]) % count if part is not None and part in read else None for part in parts]


def warn_of_biases(model: Any, stacklevel: int) -> None:
    """Warn that a prefix which PEFT trained has other outputs here, as T5's biases are the content's alone."""
    warnings.warn(
        f"fastprefix: PEFT adds {type(model).__name__}'s biases of relative positions to the scores of prefix tokens "
        "too; here they are the content's alone, so that this adapter's outputs differ from those in PEFT",
        stacklevel=stacklevel,
    )
