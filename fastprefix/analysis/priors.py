"""Where the tokens of a prefix are: next to the vocabulary or the content, and how far from where they started."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastprefix.analysis.forward import Layer, look, named_prefix
from fastprefix.analysis.projection import pca
from fastprefix.analysis.result import Result, figure
from fastprefix.errors import fail
from fastprefix.hf.adapters.installation import Installation
from fastprefix.hf.adapters.lookup import require_installation
from fastprefix.hf.adapters.nearest_tokens import nearest_tokens, soft_prompt, vocabulary
from fastprefix.prefixes.prefix import Prefix
from fastprefix.prefixes.priors import fit_gaussian
from fastprefix.prefixes.prompt import SoftPrompt
from fastprefix.prefixes.slots import mean_cosine, slots

_SHOWN = 1000  # tokens of the vocabulary on a map


@dataclass(frozen=True)
class PromptPlace(Result):
    """Where a soft prompt's P tokens are, on the CPU.

    Attributes:
        tokens: the nearest token of the vocabulary of each; its text, or its id without a tokenizer.
        cosine: ``[P]``, the cosine to that token.
        mahalanobis: ``[P]``, the distance from the mean of the vocabulary, in standard deviations of a normal
            distribution fitted to it.
        typical: the root mean square of that distance over the vocabulary itself: the root of its dimensions.
        mean_cosine: the mean cosine of all pairs of the prompt's tokens; nan with one.
        displacement: ``[P]``, the Euclidean distance from where each started; None where no start is given.
        start_mahalanobis: ``[P]``, the start's distance from the mean; None likewise.
    """

    tokens: tuple[str | int, ...]
    cosine: Tensor
    mahalanobis: Tensor
    typical: float
    mean_cosine: float
    displacement: Tensor | None
    start_mahalanobis: Tensor | None

    def plot(self) -> Any:
        """Cosine to the nearest token and Mahalanobis distance, by token."""
        made = figure(9.0, 0.22 * len(self.tokens) + 1.8)
        near, far = made.subplots(1, 2, sharey=True)
        places = list(range(len(self.tokens)))
        near.barh(places, self.cosine.tolist())
        near.set_yticks(places, [repr(token) if isinstance(token, str) else token for token in self.tokens])
        near.invert_yaxis()
        near.set(title="cosine to the nearest token")
        far.plot(self.mahalanobis.tolist(), places, "o", label="now")
        if self.start_mahalanobis is not None:
            far.plot(self.start_mahalanobis.tolist(), places, "x", label="start")
        far.axvline(self.typical, linestyle="--", linewidth=1.0, color="grey", label="vocabulary")
        far.set(title="Mahalanobis distance")
        far.legend(frameon=False)
        return made


def prompt_place(model: Any, name: str = "default", start: Any = None, tokenizer: Any = None) -> PromptPlace:
    """Where a soft prompt is: its nearest tokens, its distance from the vocabulary, and how far training moved it.

    The metrics are those of embedding priors (Sedov et al. 2024, 2412.18582). Embeddings are compared as the layers
    read them. The vocabulary is read in chunks; ``[d, d]`` is held, and decomposed in fp64.

    Args:
        model: with the soft prompt attached.
        name: of the prompt.
        start: where training started: embeddings ``[P, d]``, or a soft prompt that was attached or copied then.
        tokenizer: of transformers, for the nearest tokens' texts.

    Raises:
        ValueError: no prompt of this name is attached, it is a prefix of keys and values, or ``start`` is none of it.
    """
    installation = require_installation(model)
    prompt = soft_prompt(installation, name)
    nearest = nearest_tokens(model, name, 1, tokenizer=tokenizer)
    with vocabulary(installation, prompt) as (embed, size, device):
        gaussian = fit_gaussian(embed, size, device)
    own = prompt.without_dropout().to(device)
    first = None if start is None else _start(start, prompt).to(device)
    texts = nearest.ids[:, 0].tolist() if nearest.tokens is None else [row[0] for row in nearest.tokens]
    return PromptPlace(
        tuple(texts),
        nearest.scores[:, 0].cpu(),
        gaussian.mahalanobis(own).cpu(),
        math.sqrt(gaussian.dim),
        mean_cosine(own),
        None if first is None else (own.double() - first.double()).norm(dim=1).cpu(),
        None if first is None else gaussian.mahalanobis(first).cpu(),
    )


@dataclass(frozen=True)
class SlotMap(Result):
    """The slots of a prefix in two dimensions, next to what they could be like; on the CPU, in fp64.

    Attributes:
        kind: ``"embeddings"`` or ``"keys and values"``: what a point is made of.
        around: ``[n, 2]``, tokens of the vocabulary, or of a batch's content.
        labels: n of them, ids of the vocabulary or of the content; None where the batch has no ``input_ids``.
        end: ``[P, 2]``, the slots.
        start: ``[P, 2]``, where they started; None where no start is given.
        explained: ``[2]``, the share of the variance that each axis shows.
    """

    kind: str
    around: Tensor
    labels: tuple[int, ...] | None
    end: Tensor
    start: Tensor | None
    explained: Tensor

    def plot(self) -> Any:
        """Grey what is around; a line from the start of each slot to where it is."""
        made = figure(6.4, 5.2)
        axes = made.subplots()
        axes.plot(*self.around.T.tolist(), ".", color="lightgrey", markersize=3, label="tokens")
        if self.start is not None:
            for a, b in zip(self.start.tolist(), self.end.tolist(), strict=True):
                axes.plot(*zip(a, b, strict=True), "-", color="grey", linewidth=0.8)
            axes.plot(*self.start.T.tolist(), "x", label="start")
        axes.plot(*self.end.T.tolist(), "o", label="slots")
        axes.set(xlabel=f"{self.explained[0]:.0%} of the variance", ylabel=f"{self.explained[1]:.0%}", title=self.kind)
        axes.legend(frameon=False)
        return made


def slot_map(model: Any, batch: Mapping[str, Any] | None = None, name: str | None = None, start: Any = None) -> SlotMap:
    """The slots of a prefix in two dimensions, with where they started, and the tokens around them.

    A soft prompt's slots are shown with tokens of the vocabulary: 1000 at regular intervals, or all if there are fewer.
    Those of a prefix, the keys and values of all its layers, are shown with those of a batch's tokens in these layers.
    The axes are the principal components of all these points together.

    Args:
        model: with the prefix attached.
        batch: for a prefix of keys and values, the keyword arguments of the model's forward; see :func:`prefix_mass`.
        name: of the prefix; None for the active one.
        start: where training started: a prefix or soft prompt that was attached or copied then, or of a soft prompt its
            embeddings ``[P, d]``.

    Raises:
        ValueError: the model has no such prefix, a batch is missing or does not fit, or ``start`` is of another shape.
    """
    installation, name, prefix = named_prefix(model, name)
    labels: tuple[int, ...] | None
    if isinstance(prefix, SoftPrompt):
        around, labels = _of_vocabulary(installation, prefix)
        kind, end = "embeddings", prefix.without_dropout()
    else:
        around, labels = _of_content(model, prefix, batch, name)
        kind, end = "keys and values", torch.cat([each.vectors for each in slots(prefix)], 1)
    first = None if start is None else _start(start, prefix)
    points = [x.to(around.device, torch.float64) for x in (around, end, first) if x is not None]
    found = pca(torch.cat(points))
    parts = [x.cpu() for x in found.points.split([len(x) for x in points])]
    return SlotMap(kind, parts[0], labels, parts[1], parts[2] if parts[2:] else None, found.explained.cpu())


def _of_vocabulary(installation: Installation, prompt: SoftPrompt) -> tuple[Tensor, tuple[int, ...]]:
    with vocabulary(installation, prompt) as (embed, size, _):
        ids = torch.linspace(0, size - 1, min(size, _SHOWN)).round().long()
        return embed(ids), tuple(ids.tolist())


def _of_content(
    model: Any, prefix: Prefix, batch: Mapping[str, Any] | None, name: str
) -> tuple[Tensor, tuple[int, ...] | None]:
    """Keys and values ``[n, F]`` of a batch's tokens in the prefix's layers, and the tokens' ids."""
    if any(part is not None for part in prefix.parts):
        raise fail("name", f"{name!r} of an encoder-decoder", "a prefix of one stack of layers, which reads one text")
    if batch is None:
        raise fail("batch", None, "the arguments of the model's forward: a text whose keys and values are shown too")
    columns: list[Tensor] = []
    ids: list[int] | None = None

    def see(layer: Layer) -> None:
        nonlocal ids
        for x in ("k", "v"):
            columns.append(layer.tensors[x].transpose(1, 2)[layer.real].flatten(1).cpu())
        given = batch.get("input_ids")
        ids = None if given is None else given[layer.real.to(given.device)].tolist()

    look(model, batch, see, name)
    return torch.cat([x.double() for x in columns], 1), None if ids is None else tuple(ids)


def _start(start: Any, prefix: Prefix | SoftPrompt) -> Tensor:
    """``[P, F]`` of a start that was given."""
    if isinstance(start, Prefix | SoftPrompt):
        found = torch.cat([each.vectors for each in slots(start)], 1)
    elif isinstance(start, Tensor) and isinstance(prefix, SoftPrompt):
        found = start.detach()
    else:
        expected = "embeddings [P, d] or a soft prompt" if isinstance(prefix, SoftPrompt) else "a prefix"
        raise fail("start", type(start).__name__, f"{expected}, as it was when training started")
    want = torch.Size((prefix.num_virtual_tokens, sum(each.vectors.shape[1] for each in slots(prefix))))
    if (type(start) is not type(prefix) and isinstance(start, Prefix | SoftPrompt)) or found.shape != want:
        raise fail("start", f"a {type(start).__name__} of shape {list(found.shape)}", f"one of shape {list(want)}")
    return found
