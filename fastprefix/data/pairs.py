"""``{"prompt": ..., "completion": ...}``: training on the completions only."""

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
    """The pairs of a file with one ``{"prompt": ..., "completion": ...}`` per line, with line numbers from 1.

    Empty lines and other fields are skipped.

    Raises:
        OSError: the file cannot be read.
        ValueError: a line is not such an object (the message names file, line and field), or the file has no lines.
    """
    return [(number, check_pair(line, f"{path}, line {number}")) for number, line in read_lines(path, EXPECTED)]


def check_pair(line: dict[str, Any], where: str) -> dict[str, str]:
    """The line with the two fields of a pair only; ValueError naming the field that is wrong."""
    for field in FIELDS:
        string(line, field, where, empty=True)
    string(line, "completion", where)
    return {field: line[field] for field in FIELDS}


def prompt_ids(prompt: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token ids of a prompt, with the special tokens that the tokenizer puts in front, without eos at the end."""
    ids = list(tokenizer(prompt)["input_ids"])
    if ids and ids[-1] == tokenizer.eos_token_id:
        ids.pop()
    return ids


def encode_pair(pair: Mapping[str, str], tokenizer: PreTrainedTokenizerBase, max_length: int | None = None) -> Row:
    """Encode one pair as :func:`encode_pairs` does, without padding."""
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

    The prompt keeps special tokens that the tokenizer puts in front (bos) and loses an eos at its end; the completion
    gets one eos and no other special token. A pair longer than ``max_length`` loses the end of its completion,
    including the eos.

    Args:
        pairs: mappings with keys ``prompt`` and ``completion``, taken as they are (no space is added).
        tokenizer: needs ``eos_token_id``; rows are padded with its ``pad_token_id``, or with eos if there is none.
        max_length: the most tokens of a row, including the prompt; ``None`` for no limit.

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
    """Encode the pairs of a file as ``input_ids``, ``attention_mask`` and ``labels`` ``[L]``, unpadded, each with eos.

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
