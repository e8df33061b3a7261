"""The models' oracle: prefix tuning by explicit concatenation, beside transformers' own eager masks. Nothing of ours.

``concatenating`` gives a model an attention that repeats the heads, concatenates the prefix in front of every sample's
keys and values and takes one softmax; the caller's position ids start at P. ``run_added`` leaves the keys as they are,
and adds a term of the queries alone to the output.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

NAME = "explicit_concat"
Term = Callable[[Tensor, float], Tensor]  # queries [B, H, S, D] and the scale, to [B, H, S, D_v]
_prefixes: dict[int, tuple[Tensor, ...]] = {}  # keys, values and, of some, a bias [H_kv, P] on their scores
_terms: dict[int, Term] = {}


class Weights(NamedTuple):
    """The whole of one layer's attention, as nobody but an oracle holds it."""

    p: Tensor  # [B, H, S, P + T]
    v: Tensor  # [B, H, P + T, D_v], heads repeated
    prefix: int  # P


_kept: list[list[Weights]] = []


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    batch, heads = query.shape[:2]
    groups = heads // key.shape[1]
    prefix = 0
    if id(module) in _prefixes:
        pk, pv = (x.to(query.dtype).expand(batch, -1, -1, -1) for x in _prefixes[id(module)][:2])
        key, value, prefix = torch.cat([pk, key], 2), torch.cat([pv, value], 2), pk.shape[2]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = query @ key.transpose(-1, -2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    for bias in _prefixes.get(id(module), ())[2:]:
        own = bias.to(scores.dtype).repeat_interleave(groups, 0).unsqueeze(1)  # [H, 1, P]
        scores = scores + nn.functional.pad(own, (0, scores.shape[-1] - prefix))
    if attention_mask is not None:
        scores = scores + nn.functional.pad(
            attention_mask[..., : scores.shape[-1] - prefix].to(scores.dtype), (prefix, 0)
        )
    if position_bias is not None:  # of content only
        scores = scores + nn.functional.pad(position_bias, (prefix, 0))
    if s_aux is not None:
        scores = torch.cat(
            [scores, s_aux.to(scores.dtype).reshape(1, -1, 1, 1).expand(batch, -1, query.shape[2], -1)], -1
        )
    p = torch.softmax(scores, -1)[..., : value.shape[2]]
    o = p @ value
    for kept in _kept:
        kept.append(Weights(p, value, prefix))
    if id(module) in _terms:
        o = o + _terms[id(module)](query, scale)
    return o.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, eager_mask)


@contextmanager
def concatenating(
    model: nn.Module, key_values: Mapping[str, tuple[Tensor, ...]], terms: dict[str, Term] | None = None
) -> Iterator[Any]:
    """A copy of ``model`` with the prefix ``{attention module's name: (k, v)}`` concatenated in, and terms added."""
    twin: Any = copy.deepcopy(model)
    # Not by set_attn_implementation, which on some versions leaves the two stacks of an encoder-decoder as they were.
    for config in {id(m.config): m.config for m in twin.modules() if hasattr(m, "config")}.values():
        config._attn_implementation = NAME
    modules = dict(twin.named_modules())
    _prefixes.clear()
    _prefixes.update({id(modules[name]): kv for name, kv in key_values.items()})
    _terms.update({id(modules[name]): term for name, term in (terms or {}).items()})
    try:
        yield twin
    finally:
        _prefixes.clear()
        _terms.clear()


@contextmanager
def weights() -> Iterator[list[Weights]]:
    """Every layer's attention matrix in the oracle's forwards inside the block, in order."""
    found: list[Weights] = []
    _kept.append(found)
    try:
        yield found
    finally:
        _kept.pop()


def run_added(model: nn.Module, terms: dict[str, Term], **inputs: Any) -> Any:
    """Forward of a copy of ``model`` in which attention modules add these terms, by name."""
    with concatenating(model, {}, terms) as twin:
        return twin(**inputs)


def gated(k: Tensor, v: Tensor, gate: Tensor) -> Term:
    """``gate * softmax(scale * q k^T) v`` with keys ``[H_kv, P, D]``; the gate ``[H]``."""

    def term(q: Tensor, scale: float) -> Tensor:
        groups = q.shape[1] // k.shape[0]
        keys, values = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
        return gate[:, None, None] * (torch.softmax(q @ keys.transpose(-1, -2) * scale, -1) @ values)

    return term


def run_concat(model: nn.Module, key_values: Mapping[str, tuple[Tensor, ...]], **inputs: Any) -> Any:
    """Its forward."""
    with concatenating(model, key_values) as twin:
        return twin(**inputs)


def run_cached(model: Any, pairs: list[tuple[Tensor, Tensor]], batch: dict[str, Tensor], **inputs: Any) -> Any:
    """Forward of a bare model, itself left alone, whose cache begins with the prefix in every row.

    The oracle of models past the attention interface; it holds where no layer's window hides the prefix.
    """
    from transformers import DynamicCache

    ids = batch["input_ids"]
    cache = DynamicCache()
    for i, kv in enumerate(pairs):
        heads = model.config.num_attention_heads if type(model).__name__.startswith("Falcon") else kv[0].shape[0]
        cache.update(*(x.repeat_interleave(heads // len(x), 0).expand(len(ids), -1, -1, -1) for x in kv), i)
    mask = batch.get("attention_mask", torch.ones_like(ids))
    mask = torch.cat([mask.new_ones(len(ids), pairs[0][0].shape[1]), mask], 1)
    return model(input_ids=ids, attention_mask=mask, past_key_values=cache, **inputs)
