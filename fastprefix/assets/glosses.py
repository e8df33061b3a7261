"""1,200 WordNet noun glosses as prompt/completion pairs.

The sample: nouns whose first sense is tagged in WordNet's corpora, one lower-case word of 3 to 14 letters;
the definition without its examples, 20 to 160 ASCII characters, not naming the word itself; no coarse or
disparaging senses; drawn with a fixed seed and kept in the order drawn.
"""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Literal

NUM_TRAIN = 1000


def format_gloss(word: str, definition: str) -> dict[str, str]:
    """One pair whose text reads ``gloss: word``, newline, ``meaning: definition.``

    The closing period is part of the task: the model learns to end a gloss there.
    """
    return {"prompt": f"gloss: {word}\nmeaning:", "completion": f" {definition}."}


def load_glosses(split: Literal["train", "heldout"], limit: int | None = None) -> list[dict[str, str]]:
    """The formatted pairs of a split, always in the same order: 1,000 to train on, 200 held out.

    Args:
        limit: the largest number of pairs, from the start; ``None`` for all.

    Returns:
        Dicts with keys ``prompt`` and ``completion`` (see :func:`format_gloss`). No word or definition occurs
        twice, in one split or across both.

    Raises:
        ValueError: an unknown split, or a negative limit.
    """
    if split not in ("train", "heldout"):
        raise ValueError(f"split must be 'train' or 'heldout', not {split!r}")
    if limit is not None and limit < 0:
        raise ValueError(f"limit must not be negative, not {limit}")
    text = (files("fastprefix.assets") / "wordnet_nouns.jsonl").read_text(encoding="utf-8")
    lines = text.splitlines()
    lines = lines[:NUM_TRAIN] if split == "train" else lines[NUM_TRAIN:]
    rows = [json.loads(line) for line in lines[:limit]]
    return [format_gloss(row["prompt"], row["completion"]) for row in rows]
