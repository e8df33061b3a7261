"""The demo's training loop, held-out loss and generation, and a check that PEFT reads the adapter."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from fastprefix.data import IGNORE_INDEX, encode_pairs

BATCH_SIZE, LEARNING_RATE = 8, 1e-2
MAX_LOGIT_DIFFERENCE = 1e-3

Pairs = Sequence[dict[str, str]]
Batch = dict[str, Tensor]


def batches(pairs: Pairs, tokenizer: Any) -> Iterator[Batch]:
    """Encoded batches in order; the last one may be shorter."""
    for first in range(0, len(pairs), BATCH_SIZE):
        yield encode_pairs(pairs[first : first + BATCH_SIZE], tokenizer)


def train(model: Any, parameters: Sequence[Tensor], pairs: Pairs, tokenizer: Any, steps: int) -> list[float]:
    """Train with AdamW on shuffled batches for ``steps`` steps; returns the loss of every step."""
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE)
    losses: list[float] = []
    bar = tqdm(itertools.islice(_shuffled(pairs, tokenizer), steps), total=steps, desc="training", unit="step")
    for batch in bar:
        optimizer.zero_grad()
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        bar.set_postfix(loss=f"{losses[-1]:.2f}")
    return losses


def _shuffled(pairs: Pairs, tokenizer: Any) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(0)
    while True:
        order = torch.randperm(len(pairs), generator=generator).tolist()
        yield from batches([pairs[i] for i in order[: len(order) // BATCH_SIZE * BATCH_SIZE]], tokenizer)


@torch.no_grad()
def heldout_loss(model: Any, pairs: Pairs, tokenizer: Any) -> float:
    """The mean loss of a completion token, including eos."""
    total, count = 0.0, 0
    for batch in batches(pairs, tokenizer):
        tokens = int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())
        total += model(**batch, use_cache=False).loss.item() * tokens
        count += tokens
    return total / count


@torch.no_grad()
def generate(model: Any, pairs: Pairs, tokenizer: Any) -> list[str]:
    """Greedy completions of the prompts, each on one line."""
    texts = []
    for pair in pairs:
        prompt = tokenizer(pair["prompt"], return_tensors="pt")
        out = model.generate(**prompt, max_new_tokens=24, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        text = tokenizer.decode(out[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
        texts.append(" / ".join(line.strip() for line in text.splitlines() if line.strip()))
    return texts


@torch.no_grad()
def peft_difference(model: Any, fresh: Any, folder: Path, batch: Batch) -> float:
    """The largest difference between our logits and those of PEFT with the saved adapter on a fresh model.

    Raises:
        RuntimeError: the difference is not below :data:`MAX_LOGIT_DIFFERENCE`.
    """
    from peft import PeftModel

    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    theirs = PeftModel.from_pretrained(fresh, folder).eval()(**inputs).logits
    ours = model(**inputs, use_cache=False).logits
    real = inputs["attention_mask"].bool()
    difference = (ours - theirs)[real].abs().max().item()
    if not difference < MAX_LOGIT_DIFFERENCE:
        raise RuntimeError(f"PEFT's logits differ from ours by {difference}, expected less than {MAX_LOGIT_DIFFERENCE}")
    return difference
