"""``nearest``: the words of the vocabulary that a prefix's tokens are nearest to, of soft prompts and of prefixes."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from fastprefix.analysis.forward import Layer, named_prefix, run_bare
from fastprefix.analysis.result import Result, figure
from fastprefix.errors import fail
from fastprefix.hf.adapters.installation import Installation
from fastprefix.hf.adapters.nearest_tokens import nearest_tokens
from fastprefix.prefixes.prefix import Prefix
from fastprefix.prefixes.prompt import SoftPrompt
from fastprefix.validation import is_int

_CHUNK = 4096  # tokens of the vocabulary at a time


@dataclass(frozen=True)
class Nearest(Result):
    """For each of P prefix tokens the k nearest tokens of the vocabulary, the nearest first; on the CPU.

    Attributes:
        by: ``"embeddings"`` of a soft prompt, or ``"values"``, those of a prefix's lowest layer.
        ids: ``[P, k]`` int64.
        cosine: ``[P, k]``.
        tokens: P tuples of k texts; None without a tokenizer.
    """

    by: str
    ids: Tensor
    cosine: Tensor
    tokens: tuple[tuple[str, ...], ...] | None

    def plot(self) -> Any:
        """Cosine to the nearest token, which is written next to it."""
        made = figure(6.4, 0.22 * len(self.ids) + 1.6)
        axes = made.subplots()
        places = list(range(len(self.ids)))
        names = self.ids[:, 0].tolist() if self.tokens is None else [repr(row[0]) for row in self.tokens]
        axes.barh(places, self.cosine[:, 0].tolist())
        axes.set_yticks(places, names)
        axes.invert_yaxis()
        axes.set(title=f"cosine to the nearest token, by {self.by}")
        return made


def nearest(model: Any, name: str | None = None, k: int = 5, tokenizer: Any = None) -> Nearest:
    """The tokens of the vocabulary nearest to each token of a soft prompt or a prefix, by the cosine.

    A soft prompt's embeddings are compared with those of the vocabulary, as by :func:`fastprefix.nearest_tokens`. A
    prefix's tokens have no embedding. Its values in its lowest layer, of all heads as one vector, are compared with
    those that the model makes of each token of the vocabulary there, read alone as a text of one token. Keys are not:
    most models turn them by their position. A prefix that starts at a text has cosines of 1 to the text's tokens.

    Args:
        model: with the prefix attached. Of a prefix's model, what is below the lowest layer runs on the vocabulary.
        name: of the prefix; None for the active one.
        k: how many tokens to find for each.
        tokenizer: of transformers, for the tokens' texts.

    Raises:
        ValueError: the model has no such prefix, reads no token ids, is an encoder-decoder with a prefix, or ``k`` is
            out of range.
    """
    installation, name, prefix = named_prefix(model, name)
    if isinstance(prefix, SoftPrompt):
        found = nearest_tokens(model, name, k, tokenizer=tokenizer)
        ids, cosine = found.ids.cpu(), found.scores.cpu()
    else:
        ids, cosine = _by_values(installation, prefix, name, k)
    texts = None
    if tokenizer is not None:
        texts = tuple(tuple(str(tokenizer.decode([i])) for i in row) for row in ids.tolist())
    return Nearest("embeddings" if isinstance(prefix, SoftPrompt) else "values", ids, cosine, texts)


class _Enough(Exception):
    """The lowest layer has run, and the others need not."""


@torch.no_grad()
def _by_values(installation: Installation, prefix: Prefix, name: str, k: int) -> tuple[Tensor, Tensor]:
    model = installation.model
    if any(part is not None for part in prefix.parts):
        raise fail("name", f"{name!r} of an encoder-decoder", "a prefix of one stack of layers, which reads one text")
    if model.main_input_name != "input_ids" or prefix.is_added:
        what = f"a {prefix.kind} of {type(model).__name__}, which reads {model.main_input_name}"
        raise fail("name", f"{name!r}, {what}", "a soft prompt, or a prefix of keys and values of a model of token ids")
    size = model.config.get_text_config().vocab_size
    size = min(size, getattr(model.get_input_embeddings(), "num_embeddings", size))
    if not is_int(k) or not 1 <= k <= size:
        raise fail("k", repr(k), f"an int from 1 to {size}, the size of the vocabulary")
    lowest = installation.facts.layers.modules[prefix.layer_indices[0]]
    wanted = next(path for path, module in model.named_modules() if module is lowest)
    own = normalize(prefix.key_values()[0][1].transpose(0, 1).flatten(1).double(), dim=1)  # [P, H_kv * D_v]
    best, ids = own.new_empty(len(own), 0), torch.empty(len(own), 0, dtype=torch.long, device=own.device)
    for first in range(0, size, _CHUNK):
        chunk = torch.arange(first, min(first + _CHUNK, size), device=own.device)
        values = normalize(_values(installation, chunk, wanted).to(own), dim=1)  # [C, H_kv * D_v]
        near, places = (own @ values.T).topk(min(k, len(chunk)))
        best, ids = torch.cat([best, near], 1), torch.cat([ids, chunk[places]], 1)
        best, order = best.topk(min(k, best.shape[1]))
        ids = ids.gather(1, order)
    return ids.cpu(), best.cpu()


def _values(installation: Installation, ids: Tensor, wanted: str) -> Tensor:
    """``[C, H_kv * D_v]``, a layer's values of each token as a text of its own."""
    found: list[Tensor] = []

    def see(layer: Layer) -> None:
        if layer.name == wanted:
            found.append(layer.tensors["v"][:, :, 0].flatten(1))
            raise _Enough

    with suppress(_Enough):
        run_bare(installation, {"input_ids": ids[:, None]}, see)
    return found[0]
