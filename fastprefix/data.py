"""Prompt/completion pairs from JSON lines, for training on the completions alone."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Row = dict[str, Tensor]
FIELDS = ("prompt", "completion")
IGNORE_INDEX = -100


def read_pairs(path: str | os.PathLike[str]) -> list[tuple[int, dict[str, str]]]:
    """Line numbers, from 1, and pairs of a file with one ``{"prompt": ..., "completion": ...}`` a line.

    Empty lines are passed over, and so are other fields.

    Raises:
        OSError: the file cannot be read.
        ValueError: a line is no such object; file, line and field are named. Or there is none.
    """
    pairs = []
    for number, line in enumerate(Path(path).read_bytes().split(b"\n"), start=1):
        if line.strip():
            pairs.append((number, _pair(line, f"{path}, line {number}")))
    if not pairs:
        raise ValueError(f"{path}: no lines, expected one JSON object with the fields prompt and completion per line")
    return pairs


def _pair(line: bytes, where: str) -> dict[str, str]:
    try:
        row = json.loads(line)
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 (byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error.msg} at column {error.colno})") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where}: got {type(row).__name__}, expected an object with the fields prompt and completion")
    for field in FIELDS:
        if field not in row:
            raise ValueError(f"{where}: the field {field!r} is missing")
        if not isinstance(row[field], str):
            raise ValueError(f"{where}: the field {field!r} is {type(row[field]).__name__}, expected a string")
    if not row["completion"]:
        raise ValueError(f"{where}: the field 'completion' is empty")
    return {field: row[field] for field in FIELDS}


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
            encoded = encode_pairs([pair], tokenizer, max_length)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {str(error).removeprefix('pair 0: ')}") from None
        rows.append({name: x[0] for name, x in encoded.items()})
    return rows


def collator(pad_token_id: int) -> Callable[[Sequence[Row]], Row]:
    """What pads rows on the right to the longest and stacks them: ``[B, L]``."""
    fills = {"input_ids": pad_token_id, "attention_mask": 0, "labels": IGNORE_INDEX}

    def collate(rows: Sequence[Row]) -> Row:
        return {
            name: torch.nn.utils.rnn.pad_sequence([row[name] for row in rows], batch_first=True, padding_value=fill)
            for name, fill in fills.items()
        }

    return collate
