"""1,200 WordNet noun glosses as prompt/completion pairs, and their encoding for completion-only training.

The sample: nouns whose first sense is tagged in WordNet's corpora, one lower-case word of 3 to 14 letters;
the definition without its examples, 20 to 160 ASCII characters, not naming the word itself; no coarse or
disparaging senses; drawn with a fixed seed and kept in the order drawn.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from importlib.resources import files
from typing import TYPE_CHECKING, Literal

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NUM_TRAIN = 1000
IGNORE_INDEX = -100


def format_gloss(word: str, definition: str) -> dict[str, str]:
    """One pair whose text reads ``gloss: word``, newline, ``meaning: definition.``

    The closing period is part of the task: the model learns to end a gloss there.
    """
    return {"prompt": f"gloss: {word}\nmeaning:", "completion": f" {definition}."}


def load_glosses(split: Literal["train", "heldout"], limit: int | None = None) -> list[dict[str, str]]:
    """The formatted pairs of a split, always in the same order: 1,000 to train on, 200 held out.

    Args:
        limit: at most so many, from the start; ``None`` for all.

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


def encode_pairs(
    pairs: Iterable[Mapping[str, str]], tokenizer: PreTrainedTokenizerBase, max_length: int | None = None
) -> dict[str, torch.Tensor]:
    """Token ids of ``prompt + completion + eos`` for a causal model, right-padded to the longest pair.

    The prompt keeps the special tokens the tokenizer puts in front (bos), loses an eos behind it; the
    completion gets no special token but one eos. A pair longer than ``max_length`` loses the end of its
    completion, and with it the eos.

    Args:
        pairs: mappings with keys ``prompt`` and ``completion``, taken as they are (no space is added).
        tokenizer: needs ``eos_token_id``; pads with ``pad_token_id``, or with eos if there is none.
        max_length: at most so many tokens a row, prompt included; ``None`` for no limit.

    Returns:
        ``input_ids``, ``attention_mask`` (1 = token) and ``labels``, all ``[N, L]`` int64. ``labels`` is the
        ids of completion and eos, -100 on prompt and padding, and not shifted.

    Raises:
        ValueError: no pairs, no eos token, or a prompt that leaves no room for its completion.
    """
    eos = tokenizer.eos_token_id
    if eos is None:
        raise ValueError("the tokenizer has no eos token, so a completion could not be ended")
    pad = eos if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    rows: list[tuple[list[int], int]] = []
    for i, pair in enumerate(pairs):
        prompt = list(tokenizer(pair["prompt"])["input_ids"])
        if prompt and prompt[-1] == eos:
            prompt.pop()
        completion = [*tokenizer(pair["completion"], add_special_tokens=False)["input_ids"], eos]
        if max_length is not None and len(prompt) >= max_length:
            raise ValueError(f"pair {i}: its prompt of {len(prompt)} tokens fills max_length={max_length}")
        rows.append(([*prompt, *completion][:max_length], len(prompt)))
    if not rows:
        raise ValueError("no pairs to encode")

    length = max(len(ids) for ids, _ in rows)
    input_ids = torch.full((len(rows), length), pad, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, IGNORE_INDEX)
    for i, (ids, prompt_length) in enumerate(rows):
        input_ids[i, : len(ids)] = torch.tensor(ids)
        attention_mask[i, : len(ids)] = 1
        labels[i, prompt_length : len(ids)] = input_ids[i, prompt_length : len(ids)]
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
