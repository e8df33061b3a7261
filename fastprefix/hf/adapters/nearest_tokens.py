"""``nearest_tokens``: the tokens of the vocabulary whose embeddings are nearest to those of a soft prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from fastprefix.errors import fail
from fastprefix.hf.adapters.installation import Installation
from fastprefix.hf.adapters.lookup import require_installation, require_not_patched
from fastprefix.hf.model import dtensor, offload, probing
from fastprefix.prefixes.prompt import SoftPrompt
from fastprefix.validation import is_int

Metric = Literal["cosine", "euclid"]
Embed = Callable[[Tensor], Tensor]  # token ids to their embeddings
_CHUNK = 4096  # tokens of the vocabulary at a time


class NearestTokens(NamedTuple):
    """For each of P prompt tokens the k nearest tokens of the vocabulary, the nearest first."""

    ids: Tensor  # [P, k] int64
    scores: Tensor  # [P, k] fp32; cosines, or distances
    tokens: list[list[str]] | None  # P lists of k texts


def nearest_tokens(
    model: Any, name: str = "default", k: int = 5, metric: Metric = "cosine", tokenizer: Any = None
) -> NearestTokens:
    """Tell which tokens of the vocabulary are nearest to each token of a soft prompt (Lester et al. 2021, section 7).

    Prompt and vocabulary are compared as the layers read them: the prompt after its encoder, without dropout, and the
    vocabulary after a scaling of the embeddings, if the model has one. The vocabulary is read in chunks, so that
    ``[P, V]`` is never held.

    Args:
        model: a model with the soft prompt attached.
        name: name of the prompt.
        k: how many tokens to find for each token of the prompt, from 1 to the size V of the vocabulary.
        metric: ``"cosine"`` of the angle between two embeddings, or ``"euclid"``, their Euclidean distance.
        tokenizer: a tokenizer of transformers, to get the tokens' texts too.

    Returns:
        ``ids [P, k]`` int64, ``scores [P, k]`` fp32 and ``tokens``, P lists of k texts (None without a tokenizer), the
        nearest first: descending cosines or ascending distances. The tensors are on the prompt's device.

    Raises:
        ValueError: no prompt of this name is attached, it is a prefix of keys and values, the model is sharded, or an
            argument is out of range; the message names the argument.
    """
    installation = require_installation(model)
    prompt = soft_prompt(installation, name)
    if metric not in ("cosine", "euclid"):
        raise fail("metric", repr(metric), "'cosine' or 'euclid'")
    if tokenizer is not None and not hasattr(tokenizer, "decode"):
        raise fail("tokenizer", type(tokenizer).__name__, "a tokenizer with a method decode, or None")
    with vocabulary(installation, prompt) as (embed, size, device):
        if not is_int(k) or not 1 <= k <= size:
            raise fail("k", repr(k), f"an int from 1 to {size}, the size of the vocabulary")
        ids, scores = _nearest(prompt.without_dropout().to(device, torch.float32), embed, size, k, metric)
    where = prompt.embedding.device
    texts = None if tokenizer is None else [[tokenizer.decode([i]) for i in row] for row in ids.tolist()]
    return NearestTokens(ids.to(where), scores.to(where), texts)


def soft_prompt(installation: Installation, name: str) -> SoftPrompt:
    """The soft prompt attached under a name; raises ValueError where there is none, or a prefix of keys and values."""
    require_not_patched(installation)
    prompt = installation.selection.named(name)
    if not isinstance(prompt, SoftPrompt):
        expected = "a soft prompt: keys and values are not embeddings, to which those of tokens could be near"
        raise fail("name", f"{name!r}, a prefix of keys and values", expected)
    return prompt


@contextmanager
def vocabulary(installation: Installation, prompt: SoftPrompt) -> Iterator[tuple[Embed, int, torch.device]]:
    """Inside the block, the embeddings of token ids as the layers read them, the vocabulary's size, and the device.

    The prompt may have been trained with embeddings of its own, and another one with others.
    """
    dtensor.refuse(installation.model)
    with installation.lock.hold(), installation.modules.in_place(prompt.modules_to_save.named()):
        embeddings = installation.facts.layers.prompted.word_embeddings
        size = installation.model.config.get_text_config().vocab_size
        size = min(size, getattr(embeddings, "num_embeddings", size))
        device = offload.device(embeddings)
        with probing.evaluating(embeddings):  # without the noise that some trainers add to embeddings

            def embed(ids: Tensor) -> Tensor:
                found = embeddings(ids.to(device))
                return found if found.dtype == torch.float64 else found.float()

            yield embed, size, device


def _nearest(own: Tensor, embed: Embed, size: int, k: int, metric: Metric) -> tuple[Tensor, Tensor]:
    """Ids ``[P, k]`` and scores ``[P, k]`` of the tokens nearest to ``own [P, d]``."""
    unit, centre = normalize(own, dim=-1), own.mean(0)
    best = torch.empty(len(own), 0, device=own.device)  # [P, up to k], larger is nearer
    ids = torch.empty(len(own), 0, dtype=torch.long, device=own.device)
    for first in range(0, size, _CHUNK):
        chunk = torch.arange(first, min(first + _CHUNK, size), device=own.device)
        table = embed(chunk).float()  # [C, d]
        if metric == "cosine":
            near = unit @ normalize(table, dim=-1).T  # [P, C]
        else:
            # Of the squared distance, the part that depends on the token. Squares round less next to the origin.
            table = table - centre
            near = 2.0 * (own - centre) @ table.T - table.square().sum(-1)
        near, places = near.topk(min(k, len(chunk)))
        best, ids = torch.cat([best, near], 1), torch.cat([ids, chunk[places]], 1)
        best, order = best.topk(min(k, best.shape[1]))
        ids = ids.gather(1, order)
    # The squares above cancel where a distance is small; those of the tokens found are computed from differences.
    found = embed(ids).float()  # [P, k, d]
    if metric == "cosine":
        scores = (normalize(found, dim=-1) * unit[:, None]).sum(-1)
    else:
        scores = (found - own[:, None]).norm(dim=-1)
    order = scores.argsort(dim=-1, descending=metric == "cosine", stable=True)
    return ids.gather(1, order), scores.gather(1, order)
