"""``{"prompt": ..., "completion": ...}``: training on the completions alone."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from fastprefix.data.batches import Row, collator, row
from fastprefix.data.lines import read_lines, string

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FIELDS = ("prompt", "completion")
EXPECTED = "the fields prompt and completion"


def read_pairs(path: str | os.PathLike[str]) -> list[tuple[int, dict[str, str]]]:
    """Line numbers, from 1, and pairs of a file with one ``{"prompt": ..., "completion": ...}`` a line.

    Empty lines are passed over, and so are other fields.

    Raises:
        OSError: the file cannot be read.
        ValueError: a line is no such object; file, line and field are named. Or there is none.
    """
    return [(number, check_pair(line, f"{path}, line {number}")) for number, line in read_lines(path, EXPECTED)]


def check_pair(line: dict[str, Any], where: str) -> dict[str, str]:
    """The pair alone; ValueError naming the field that is wrong."""
    for field in FIELDS:
        string(line, field, where, empty=True)
    string(line, "completion", where)
    return {field: line[field] for field in FIELDS}


def prompt_ids(prompt: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """A prompt's tokens: with the special tokens that the tokenizer puts in front, without an eos behind."""
    ids = list(tokenizer(prompt)["input_ids"])
    if ids and ids[-1] == tokenizer.eos_token_id:
        ids.pop()
    return ids


def encode_pair(pair: Mapping[str, str], tokenizer: PreTrainedTokenizerBase, max_length: int | None = None) -> Row:
    """One pair as :func:`encode_pairs` has it, unpadded."""
    eos = need_eos(tokenizer)
    prompt = prompt_ids(pair["prompt"], tokenizer)
    completion = [*tokenizer(pair["completion"], add_special_tokens=False)["input_ids"], eos]
    if max_length is not None and len(prompt) >= max_length:
        raise ValueError(f"its prompt of {len(prompt)} tokens fills max_length={max_length}")
    ids = [*prompt, *completion][:max_length]
    return row(ids, [i >= len(prompt) for i in range(len(ids))])


def need_eos(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that ends a text; ValueError for a tokenizer without one."""
    eos = tokenizer.eos_token_id
    if eos is None:
        raise ValueError("the tokenizer has no eos token, so a completion could not be ended")
    return int(eos)


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
    eos, rows = need_eos(tokenizer), []
    for i, pair in enumerate(pairs):
        try:
            rows.append(encode_pair(pair, tokenizer, max_length))
        except ValueError as error:
            raise ValueError(f"pair {i}: {error}") from None
    if not rows:
        raise ValueError("no pairs to encode")
    return collator(eos if tokenizer.pad_token_id is None else tokenizer.pad_token_id)(rows)


def load_pairs(
    path: str | os.PathLike[str], tokenizer: PreTrainedTokenizerBase, max_length: int | None = None
) -> list[Row]:
    """The pairs of a file as ``input_ids``, ``attention_mask`` and ``labels`` ``[L]``, unpadded, each ended by eos.

    Raises:
        OSError, ValueError: as :func:`read_pairs`; or a prompt leaves no room for its completion.
    """
    rows = []
    for number, pair in read_pairs(path):
        try:
            rows.append(encode_pair(pair, tokenizer, max_length))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
    return rows
