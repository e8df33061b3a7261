"""``attention_matching``: the start of a cartridge, from a model and a text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastprefix.cartridges import matching
from fastprefix.cartridges.reading import TEXT, TextPrefix, reading
from fastprefix.errors import fail
from fastprefix.hf.adapters.lookup import require_installation
from fastprefix.hf.attention.recording import AttentionCall, recording
from fastprefix.hf.model import offload, probing, wrappers
from fastprefix.prefixes.init import Init

NUM_QUERIES = 1024  # tokens that are read after the text
_PIECE = 128  # tokens of the text that are read again as one row


def attention_matching(
    model: Any,
    text: str | Sequence[int] | Tensor,
    tokens: int,
    *,
    tokenizer: Any = None,
    queries: Sequence[Sequence[int]] | None = None,
    mass: str = "keys",
) -> Init:
    """Keys and values that stand for a text's, fitted in closed form: where the training of a cartridge starts.

    Attention Matching (Zweiger et al. 2026, arXiv:2602.16284): in each layer and key/value head the ``tokens`` keys of
    the text with the largest attention are kept, and values are fitted by least squares so that attention over them
    gives what attention over the whole text gives. The keys keep their distance to the content, which begins at
    position ``tokens`` after such a prefix. The paper also fits a bias for each key, which PEFT's CARTRIDGE format
    cannot hold; by default the keys are moved so that their scores change by about that bias.

    Args:
        model: a causal language model of transformers; afterwards it is as it was.
        text: the document, or its T token ids, ``[T]``.
        tokens: P, how many keys are kept, at most T.
        tokenizer: needed where ``text`` is a string.
        queries: rows of token ids that the model reads after the text, whose queries are the reference: best what the
            cartridge will be asked. Default 1,024 tokens of the text again, as the paper's "repeat-prefill".
        mass: ``"keys"`` as above, ``"bias"`` to return the paper's bias, or ``"none"`` to do neither.

    Returns:
        An ``Init``, as :func:`fastprefix.init.kv` returns, for ``PrefixConfig(init=..., num_frozen_tokens=1)``; with
        a bias ``PrefixConfig(init=..., num_frozen_tokens=1, prefix_bias=True)``.

    Raises:
        ValueError: an argument does not fit, the model cannot carry a prefix, or a layer sees fewer tokens than the
            text has (a sliding window) or caps its scores.
    """
    matching.check_mass(mass)
    ids = token_ids(text, tokenizer)
    bare = wrappers.unwrapped(model, but=wrappers.ADDING)
    with reading(bare, ids, tokens) as whole:
        return match_prefix(bare, whole, tokens, again(ids) if queries is None else queries, mass)


def token_ids(text: str | Sequence[int] | Tensor, tokenizer: Any) -> list[int]:
    """The token ids of a text that is given as a string, or as these ids."""
    if isinstance(text, str):
        if tokenizer is None:
            raise fail("tokenizer", None, "a tokenizer, as the text is a string")
        text = tokenizer(text)["input_ids"]
    ids = [int(i) for i in torch.as_tensor(text).reshape(-1).tolist()]
    if not ids:
        raise fail("text", "no tokens", "at least one")
    return ids


def again(ids: Sequence[int], count: int = NUM_QUERIES) -> list[list[int]]:
    """Pieces of a text, evenly spread over it, of about ``count`` tokens together."""
    size = min(_PIECE, len(ids))
    pieces = max(1, min(count, len(ids)) // size)
    firsts = [round(i * (len(ids) - size) / max(pieces - 1, 1)) for i in range(pieces)]
    return [list(ids[first : first + size]) for first in firsts]


def match_prefix(
    model: Any, whole: TextPrefix, tokens: int, rows: Sequence[Sequence[int]], mass: str = "keys", name: str = TEXT
) -> Init:
    """Match the active prefix of a whole text by ``tokens`` tokens, with the queries of some rows after it."""
    reference = record_queries(model, rows)
    keys, values, biases = [], [], []
    for (k, v), (q, scale) in zip(whole.key_values(), reference, strict=True):
        dtype = torch.float64 if k.dtype == torch.float64 else torch.float32
        found = matching.match(q.to(k.device, dtype), k.to(dtype), v.to(dtype), tokens, scale, mass=mass)
        keys.append(found.keys)
        values.append(found.values)
        biases += [] if found.bias is None else [found.bias]
    return Init("attention_matching", keys=tuple(keys), values=tuple(values), biases=tuple(biases) or None)


@torch.no_grad()
def record_queries(model: Any, rows: Sequence[Sequence[int]]) -> list[tuple[Tensor, float]]:
    """Each layer's queries ``[H_kv, n, D]`` of all tokens of some rows after the active prefix, and its score's factor.

    Raises:
        ValueError: there are no tokens, or a layer caps its scores.
    """
    owner = require_installation(model).facts.layers.main.owner
    modules = require_installation(model).facts.layers.modules
    queries: list[list[Tensor]] = [[] for _ in modules]
    scales = [0.0] * len(modules)
    for batch in _of_equal_length(rows):
        with probing.evaluating(owner), recording() as calls:
            owner(input_ids=torch.tensor(batch, device=offload.device(owner)), use_cache=False)
        found = {id(call.module): call for call in calls}
        for i, module in enumerate(modules):
            grouped, scales[i] = _grouped(found[id(module)])
            queries[i].append(grouped)
    return [(torch.cat(parts, 1), scale) for parts, scale in zip(queries, scales, strict=True)]


def _of_equal_length(rows: Sequence[Sequence[int]]) -> list[list[list[int]]]:
    """The rows in batches of one length each, so that none is padded."""
    batches: dict[int, list[list[int]]] = {}
    for row in rows:
        batches.setdefault(len(row), []).append([int(i) for i in row])
    if not batches or 0 in batches:
        raise fail("queries", "no rows, or one without tokens", "rows of at least one token id")
    return list(batches.values())


def _grouped(call: AttentionCall) -> tuple[Tensor, float]:
    """``[H_kv, n, D]`` queries of one call, those of all query heads of a group together, and the score's factor."""
    if call.options.get("softcap") is not None:
        raise fail("model", "one that caps its scores (softcap)", "one that does not: the closed form has no cap")
    q, heads = call.tensors["q"], call.tensors["k"].shape[1]  # [B, H, S, D]
    grouped = q.unflatten(1, (heads, q.shape[1] // heads)).permute(1, 0, 2, 3, 4).flatten(1, 3)
    scale = call.options.get("scale")
    return grouped.clone(), q.shape[-1] ** -0.5 if scale is None else float(scale)
