"""Real speech: three utterances of a LibriVox reader, 16 kHz, with their transcripts (``tests/data/librivox``)."""

from __future__ import annotations

import lzma
import re
import wave
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

FOLDER = Path(__file__).parents[1] / "data" / "librivox"
HELDOUT, *TRAIN = "0880", "0890", "0930"


def transcripts() -> dict[str, str]:
    """In lower case and without punctuation."""
    return dict(line.split(" ", 1) for line in (FOLDER / "transcripts.txt").read_text(encoding="ascii").splitlines())


def features(processor: Any, names: list[str]) -> Tensor:
    """Log-mel spectrograms ``[B, 80, 3000]``."""
    sounds = []
    for name in names:
        with lzma.open(FOLDER / f"{name}.wav.xz") as file, wave.open(file) as sound:
            assert sound.getparams()[:3] == (1, 2, 16000)
            sounds.append(np.frombuffer(sound.readframes(sound.getnframes()), "<i2") / 32768)
    found = processor(sounds, sampling_rate=16000, return_tensors="pt").input_features
    assert isinstance(found, Tensor)
    return found


def batch(processor: Any, names: list[str]) -> dict[str, Tensor]:
    """Utterances and their transcripts as a model's ``input_features`` and ``labels``."""
    texts = [" " + transcripts()[name] for name in names]
    tokens = processor.tokenizer(texts, padding=True, return_tensors="pt")
    labels = tokens.input_ids.masked_fill(tokens.attention_mask == 0, -100)
    # The model itself puts the first token, the start, in front.
    return {"input_features": features(processor, names), "labels": labels[:, 1:]}


def words(text: str) -> list[str]:
    """Without case and punctuation."""
    return re.findall(r"[a-z']+", text.lower())


def word_errors(reference: list[str], heard: list[str]) -> int:
    """Words to put in, leave out or replace."""
    row = list(range(len(heard) + 1))
    for i, word in enumerate(reference, 1):
        above, row[0] = row[0], i
        for j, other in enumerate(heard, 1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (word != other))
    return row[-1]
