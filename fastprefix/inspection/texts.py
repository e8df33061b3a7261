"""The texts that an inspection reads, as one batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastprefix.assets.glosses import load_glosses

_GLOSSES = 3  # that are read where no text is given


@dataclass(frozen=True)
class Sample:
    """A text, and how much of it is given to the model to go on from."""

    name: str
    text: str
    given: str | None  # None: of a text without a place where an answer begins, the first tokens


def own_samples() -> list[Sample]:
    """Held-out glosses of WordNet, where no text is given."""
    pairs = load_glosses("heldout", _GLOSSES)
    return [Sample(f"gloss {i + 1}", p["prompt"] + p["completion"], p["prompt"]) for i, p in enumerate(pairs)]


def read_samples(files: Sequence[str]) -> list[Sample]:
    """Texts from files.

    Raises:
        ValueError: a file is no UTF-8 or has no text; it is named.
    """
    found = []
    for file in files:
        try:
            text = Path(file).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"--text: {file} is not UTF-8 ({error.reason} at byte {error.start})") from None
        if not text.strip():
            raise ValueError(f"--text: {file} has no text")
        found.append(Sample(Path(file).name, text, None))
    return found


@dataclass(frozen=True)
class Texts:
    """Samples as token ids, padded on the right: ``input_ids [B, S]`` and ``attention_mask``."""

    samples: tuple[Sample, ...]
    batch: dict[str, Tensor]
    tokens: tuple[tuple[str, ...], ...]  # each row's tokens as texts, without padding
    prompts: tuple[Tensor, ...]  # [L] of each row, what the model goes on from


def encode(samples: Sequence[Sample], tokenizer: Any, most: int, prompt: int) -> Texts:
    """Samples as a batch, each cut to ``most`` tokens; of a plain text its first ``prompt`` are given, at most half."""
    rows = [tokenizer(sample.text)["input_ids"][:most] for sample in samples]
    length = max(map(len, rows))
    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    ids, mask = torch.full((len(rows), length), pad), torch.zeros(len(rows), length, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), 1
    prompts = []
    for sample, row in zip(samples, rows, strict=True):
        given = (
            row[: max(1, min(prompt, len(row) // 2))] if sample.given is None else tokenizer(sample.given)["input_ids"]
        )
        prompts.append(torch.tensor(given))
    texts = tuple(tuple(str(tokenizer.decode([i])) for i in row) for row in rows)
    return Texts(tuple(samples), {"input_ids": ids, "attention_mask": mask}, texts, tuple(prompts))
