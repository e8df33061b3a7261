"""Models with a soft prompt inside their rows, and the same with its embeddings concatenated by hand, row by row."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastprefix
from fastprefix import PromptConfig, init
from tests.model_zoo.architectures import ROWS, VOCAB

P, B, S = 5, 3, 9
MARKER = 2  # no other token of these rows is it
IGNORED = -100


class Batch(NamedTuple):
    """Rows with a place for a prompt in each."""

    ids: Tensor  # [B, S]
    mask: Tensor | None  # [B, S]
    labels: Tensor  # [B, S]
    start: list[int]  # the column where each row's prompt begins


def inserted(name: str, place: Any, dtype: torch.dtype = torch.float64) -> tuple[Any, Any, Any]:
    """A bare model, a copy with a soft prompt at a place inside its rows, and the prompt."""
    bare = ROWS[name].build(dtype)
    model = copy.deepcopy(bare)
    bare.set_attn_implementation("eager")
    prompt = fastprefix.attach(model, PromptConfig(P, init=init.normal(1.0), place=place))
    prompt.to(dtype)
    return bare, model, prompt


def batch(place: Any, side: str = "none") -> Batch:
    """Three rows of different lengths, padded on one side, whose prompts stand at different places."""
    torch.manual_seed(1)
    ids = torch.randint(3, VOCAB, (B, S))
    mask = torch.ones_like(ids)
    start = [4, 6, 5]
    for row in range(B):
        if side == "left":
            mask[row, :row] = 0
        elif side == "right":
            mask[row, S - row :] = 0
        if place == MARKER:
            ids[row, start[row]] = MARKER
    labels = ids.masked_fill(mask == 0, IGNORED)
    columns = torch.arange(S)
    if place == "after":
        labels = labels.masked_fill(columns < torch.tensor(start)[:, None], IGNORED)
    else:
        labels = labels.masked_fill(columns == mask.argmax(1, keepdim=True), IGNORED)
    return Batch(ids, None if side == "none" else mask, labels, start)


def explicit(
    bare: Any, embedding: Tensor, ids: Tensor, start: int, place: Any, mask: Tensor | None = None
) -> tuple[Tensor, list[int]]:
    """The oracle for one row ``[S]``: ``[T, V]`` of transformers alone on its real tokens with the prompt among them.

    Also for each real column of the text, the place in that output where its prediction stands.
    """
    real = [c for c in range(len(ids)) if mask is None or mask[c]]
    before = [c for c in real if c < start]
    after = [c for c in real if c >= start + (place == MARKER)]
    table = bare.get_input_embeddings()
    parts = [table(ids[before]), embedding.to(table.weight.dtype), table(ids[after])]
    output = bare(inputs_embeds=torch.cat(parts)[None], use_cache=False)[0][0]
    first = [*range(len(before))]
    if place == MARKER:
        first.append(len(before) + P - 1)
    else:  # the prompt's last token predicts in place of the last one before it
        first[-1] = len(before) + P - 1
    return output, [*first, *range(len(before) + P, len(before) + P + len(after))]


def logits_and_loss(bare: Any, embedding: Tensor, rows: Batch, place: Any) -> list[Tensor]:
    """The oracle for a batch: the logits of its real tokens, one after the other, and the mean loss."""
    logits, losses = [], []
    for i in range(len(rows.ids)):
        mask = None if rows.mask is None else rows.mask[i]
        output, at = explicit(bare, embedding, rows.ids[i], rows.start[i], place, mask)
        logits.append(output[at])
        real = [c for c in range(rows.ids.shape[1]) if mask is None or mask[c]]
        for column in real[
            1:
        ]:  # each text token is predicted by what stands in front of it, the prompt's last included
            if rows.labels[i, column] == IGNORED or (place == MARKER and column == rows.start[i]):
                continue
            before = sum(c < column and not (place == MARKER and c == rows.start[i]) for c in real)
            predicts = output[before + P * (column >= rows.start[i]) - 1]
            losses.append(torch.nn.functional.cross_entropy(predicts[None], rows.labels[i, column][None]))
    return [torch.cat(logits), torch.stack(losses).mean()]


@torch.no_grad()
def generated_by_hand(bare: Any, embedding: Tensor, rows: Batch, place: Any, steps: int) -> Tensor:
    """``[B, S + steps]``: greedy generation without markers, by a whole forward of each row for each token."""
    found = []
    for i, row in enumerate(rows.ids):
        start = rows.start[i] if place == MARKER else len(row)
        mask = None if rows.mask is None else rows.mask[i]
        for _ in range(steps):
            output, at = explicit(bare, embedding, row, start, place, mask)
            output[:, MARKER] = -torch.inf
            row = torch.cat([row, output[at[-1]].argmax()[None]])
            mask = None if mask is None else torch.cat([mask, mask.new_ones(1)])
        found.append(row)
    return torch.stack(found)
