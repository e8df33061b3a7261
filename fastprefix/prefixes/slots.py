"""Whether the tokens of a prefix, its slots, are still different from each other, and whether all of them train.

Nothing here needs a model or a batch: it is read from the numbers of a prefix and from their gradients. Slots that are
equal get equal gradients and stay equal. Slots that point in one direction do the work of one. A slot without a
gradient is one that no query reads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastprefix.prefixes.kv import DirectKV
from fastprefix.prefixes.llama_adapter import AdapterKV
from fastprefix.prefixes.prefix import Prefix
from fastprefix.prefixes.prompt import SoftPrompt

COLLAPSED = 0.95  # mean pairwise cosine from which slots count as one direction
TIED = 1e-4  # distance of two slots relative to the larger norm, below which they count as equal
DEAD = 1e-6  # gradient of a slot relative to the median of all, below which no query reads it
_ROWS = 512  # slots at a time in a comparison of all pairs


class Slots(NamedTuple):
    """The slots of one layer, or those of a soft prompt's embeddings."""

    layer: int | None  # index of the attention layer; None for embeddings
    vectors: Tensor  # [P, F]; of a layer F = H_kv * (D + D_v), its keys and then its values


@torch.no_grad()
def slots(prefix: Prefix | SoftPrompt) -> list[Slots]:
    """The slots of every layer of a prefix as vectors, or those of a soft prompt (after its encoder)."""
    if isinstance(prefix, SoftPrompt):
        return [Slots(None, prefix.without_dropout())]
    pairs = zip(prefix.layer_indices, prefix.key_values(), strict=True)
    return [Slots(i, torch.cat([x.transpose(0, 1).flatten(1).float() for x in kv], 1)) for i, kv in pairs]


def mean_cosine(x: Tensor) -> float:
    """The mean cosine of all pairs of rows of ``[P, F]``; a row of zeros has the cosine 0. nan for a single row."""
    P = len(x)
    if P < 2:
        return math.nan
    unit = torch.nn.functional.normalize(x.double(), dim=1)
    norms = unit.square().sum(1)  # 1, or 0 of a row of zeros
    return float((unit.sum(0).square().sum() - norms.sum()) / (P * (P - 1)))


def effective_rank(x: Tensor) -> float:
    """The exponential of the entropy of the singular values of ``[P, F]`` (Roy & Vetterli 2007); 0 of a zero matrix."""
    values = torch.linalg.svdvals(x.double())
    total = values.sum()
    if not total > 0:
        return 0.0
    shares = values / total
    return float(torch.special.entr(shares).sum().exp())


def tied(x: Tensor, tolerance: float = TIED) -> list[tuple[int, int]]:
    """Pairs ``i < j`` of rows of ``[P, F]`` at a distance of at most ``tolerance`` times the larger of their norms."""
    x = x.double()
    norms, found = x.norm(dim=1), []
    for first in range(0, len(x), _ROWS):
        rows = x[first : first + _ROWS]
        # By differences: the squares of a product would cancel where rows are nearly equal.
        distance = torch.cdist(rows, x, compute_mode="donot_use_mm_for_euclid_dist")
        near = distance <= tolerance * torch.maximum(norms[first : first + _ROWS, None], norms)
        found += [(first + i, j) for i, j in near.nonzero().tolist() if first + i < j]
    return found


def tied_everywhere(layers: Sequence[Slots], tolerance: float = TIED) -> list[tuple[int, int]]:
    """Pairs of slots that are tied in every layer."""
    pairs = [set(tied(layer.vectors, tolerance)) for layer in layers]
    return sorted(set.intersection(*pairs)) if pairs else []


def complaints(prefix: Prefix | SoftPrompt) -> dict[str, str]:
    """What is wrong with the slots of a prefix, a sentence by kind (``tied``, ``collapsed``); empty if nothing is."""
    found: dict[str, str] = {}
    layers = slots(prefix)
    if prefix.num_virtual_tokens < 2 or not layers:
        return found
    if pairs := tied_everywhere(layers):
        i, j = pairs[0]
        more = f" (and {len(pairs) - 1} more pairs)" if pairs[1:] else ""
        found["tied"] = (
            f"slots {i} and {j}{more} are equal: equal slots get equal gradients and stay equal, so that they count "
            "once. Start at different numbers, such as init.normal or different tokens"
        )
    cosines = [mean_cosine(layer.vectors) for layer in layers]
    cosine = sum(cosines) / len(cosines)
    if cosine >= COLLAPSED:
        rank = max(effective_rank(layer.vectors) for layer in layers)
        found["collapsed"] = (
            f"the {prefix.num_virtual_tokens} slots have collapsed to one direction: their mean pairwise cosine is "
            f"{cosine:.3f} and their effective rank at most {rank:.1f}. Fewer slots would do as well"
        )
    return found


@torch.no_grad()
def without_gradient(prefix: Prefix | SoftPrompt, tolerance: float = DEAD) -> list[int]:
    """The trained slots whose gradient is nearly zero in every layer next to the median slot's: no query reads them.

    It is asked after a backward pass. Slots of an MLP have no gradient of their own, but for those of its embeddings.

    Returns:
        Their indices; empty where there are no gradients.
    """
    sizes: list[Tensor] = []  # [P - F] of each layer
    frozen = 0
    if isinstance(prefix, SoftPrompt):
        if prefix.embedding.grad is not None:
            sizes.append(prefix.embedding.grad.float().norm(dim=1))
    elif prefix.encoder is None:
        for layer in prefix.layers:
            if isinstance(layer, DirectKV) and layer.v.grad is not None:
                frozen = layer.num_frozen_tokens
                grads = [x.grad.float() for x in (layer.k, layer.v) if x.grad is not None]
                sizes.append(torch.stack([g.square().sum((0, 2)) for g in grads]).sum(0).sqrt())
            elif isinstance(layer, AdapterKV) and layer.prompt.grad is not None:
                sizes.append(layer.prompt.grad.float().norm(dim=1))
    if not sizes or not len(sizes[0]):
        return []
    whole = torch.stack([x.to(sizes[0].device) for x in sizes]).norm(dim=0)  # [P - F]
    return (
        []
        if not whole.median() > 0
        else [frozen + i for i in (whole < tolerance * whole.median()).nonzero()[:, 0].tolist()]
    )
