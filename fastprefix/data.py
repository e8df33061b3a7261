"""Prompt/completion pairs from JSON lines, for training on the completions alone."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastprefix.assets.glosses import IGNORE_INDEX, encode_pairs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Row = dict[str, Tensor]
FIELDS = ("prompt", "completion")


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
