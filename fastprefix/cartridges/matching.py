"""Attention Matching: a few keys and values in place of many, in closed form (Zweiger et al. 2026, arXiv:2602.16284).

A text of T tokens has keys ``K`` and values ``V`` in a layer. P keys ``C_k`` and values ``C_v`` are wanted, with a bias
``b`` for each key, so that for reference queries ``q``

    softmax(q C_k + b) C_v  =  softmax(q K) V           the attention output
    sum exp(q C_k + b)      =  sum exp(q K)             the attention mass

The second is what attention over the text and what follows it depends on: it is the text's share. The keys are chosen
from the text's. The biases follow by non-negative least squares for ``exp(b)``, and then the values by least squares.
Everything here is a function of tensors, for the key/value heads of one layer at once.

Shapes: ``H_kv`` key/value heads, ``T`` the text's keys, ``P`` those that are kept, ``n`` reference queries of each
key/value head (those of all query heads that read it), ``D`` and ``D_v`` the dimensions of a key and of a value.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastprefix.errors import fail

SMALLEST_WEIGHT = 1e-3  # of a key, exp(bias): below, the key might as well have been left out
RIDGE = 1e-4  # of the least squares, relative to the mean of the Gram matrix's diagonal
_SCORES = 2**24  # numbers of a matrix of scores that is held at a time


class Reading(NamedTuple):
    """What attention over the whole text gives for the reference queries."""

    output: Tensor  # [H_kv, n, D_v]
    lse: Tensor  # [H_kv, n], log of the mass
    mass: Tensor  # [H_kv, T], each key's share of the attention, as the root of its mean square over the queries


class Matched(NamedTuple):
    """Keys and values that stand for a text's in one layer."""

    keys: Tensor  # [H_kv, P, D]
    values: Tensor  # [H_kv, P, D_v]
    bias: Tensor | None  # [H_kv, P], added to the scores; None where there is none
    places: Tensor  # [H_kv, P] int64, ascending: which of the text's keys were kept


def match(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    tokens: int,
    scale: float,
    *,
    mass: str = "keys",
    num_first: int = 1,
    ridge: float = RIDGE,
) -> Matched:
    """Keys and values of ``tokens`` tokens that attend as those of the whole text.

    Args:
        queries: ``[H_kv, n, D]`` reference queries, rotated as the model rotates them.
        keys: ``[H_kv, T, D]`` of the text.
        values: ``[H_kv, T, D_v]`` of the text.
        tokens: P, at most T.
        scale: factor of the scores.
        mass: how the attention mass is kept. ``"bias"`` returns the paper's bias of each key. ``"keys"`` moves the keys
            so that their scores change by that bias, as well as a shift of a key can do that for all queries; this is
            for formats that have no bias. ``"none"`` keeps the keys as they are, and the mass is then too small.
        num_first: how many of the text's first keys are kept whatever their mass: the first token is often a sink.
        ridge: regularisation, relative; it draws the values to those of the chosen keys, not to zero.

    Returns:
        :class:`Matched`, in the dtype of ``keys``. With ``tokens == T`` they are the text's own, but for rounding.

    Raises:
        ValueError: an argument does not fit; it is named.
    """
    _check(queries, keys, values, tokens, mass, num_first)
    dtype = keys.dtype
    reading = attend(queries, keys, values, scale)
    places = choose(reading.mass, tokens, num_first)
    index = places[..., None]
    kept = keys.take_along_dim(index, 1)
    own = values.take_along_dim(index, 1)
    bias = None
    if mass != "none":
        bias = fit_bias(queries, kept, reading.lse, scale)
        if mass == "keys":
            kept, bias = fold_bias(queries, kept, bias, scale), None
    fitted = fit_values(queries, kept, reading.output, own, scale, bias=bias, ridge=ridge)
    return Matched(kept.to(dtype), fitted.to(dtype), None if bias is None else bias.to(dtype), places)


def attend(queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> Reading:
    """Attention of the queries over all keys, a few queries at a time."""
    heads, n, _ = queries.shape
    output, lse, squares = [], [], keys.new_zeros(heads, keys.shape[1])
    for part in queries.split(max(1, _SCORES // (heads * keys.shape[1])), 1):
        scores = scale * (part @ keys.mT)  # [H_kv, part, T]
        lse.append(scores.logsumexp(-1))
        weights = (scores - lse[-1][..., None]).exp_()
        output.append(weights @ values)
        squares += weights.square_().sum(1)
    return Reading(torch.cat(output, 1), torch.cat(lse, 1), (squares / n).sqrt())


def choose(mass: Tensor, tokens: int, num_first: int = 1) -> Tensor:
    """``[H_kv, P]`` places of the first ``num_first`` keys and of the others of the largest mass, ascending."""
    mass = mass.clone()
    mass[:, :num_first] = torch.inf
    return mass.topk(tokens, -1).indices.sort(-1).values


def fit_bias(
    queries: Tensor, keys: Tensor, lse: Tensor, scale: float, smallest: float = SMALLEST_WEIGHT, steps: int = 300
) -> Tensor:
    """``[H_kv, P]`` biases with which the keys have the mass ``exp(lse)`` for every query, as nearly as possible.

    Non-negative least squares for the weights ``w = exp(bias)`` of ``sum_j w_j exp(q . k_j - lse) = 1``.

    Args:
        queries: ``[H_kv, n, D]``.
        keys: ``[H_kv, P, D]``, those that were chosen.
        lse: ``[H_kv, n]`` of the scores of the whole text.
        scale: factor of the scores.
        smallest: lower bound of a weight.
        steps: most steps of the accelerated projected gradient.
    """
    parts = (scale * (queries @ keys.mT) - lse[..., None]).exp()  # [H_kv, n, P], each key's share of the mass
    gram, sums = (parts.mT @ parts).double(), parts.sum(1).double()  # [H_kv, P, P], [H_kv, P]
    return non_negative(gram, sums, smallest, steps).log().to(keys.dtype)


def non_negative(gram: Tensor, target: Tensor, smallest: float, steps: int) -> Tensor:
    """``[H, P]`` weights of at least ``smallest`` that minimise ``w G w / 2 - w t``, by accelerated projected gradient.

    The columns are scaled to a diagonal of ones first. The momentum is dropped where it points uphill.
    """
    norm = gram.diagonal(dim1=-2, dim2=-1).clamp(min=torch.finfo(gram.dtype).tiny).sqrt()  # [H, P]
    gram, target, least = gram / (norm[:, :, None] * norm[:, None]), target / norm, smallest * norm
    step = 1.0 / gram.abs().sum(-1).amax(-1, keepdim=True)  # by Gershgorin, at most 1 / the largest eigenvalue
    now = ahead = norm.clone()  # weights of 1
    momentum = gram.new_ones(gram.shape[0], 1)
    for _ in range(steps):
        slope = (gram @ ahead[..., None])[..., 0] - target
        after = torch.maximum(ahead - step * slope, least)
        uphill = ((ahead - after) * (after - now)).sum(-1, keepdim=True) > 0
        momentum = torch.where(uphill, 1.0, momentum)
        grown = (1.0 + (1.0 + 4.0 * momentum.square()).sqrt()) / 2.0
        ahead = torch.where(uphill, after, after + (momentum - 1.0) / grown * (after - now))
        if bool((after - now).abs().amax() <= 1e-9 * after.abs().amax()):
            return after / norm
        now, momentum = after, grown
    return now / norm


def fold_bias(queries: Tensor, keys: Tensor, bias: Tensor, scale: float, ridge: float = RIDGE) -> Tensor:
    """``[H_kv, P, D]`` keys ``k_j + b_j u``, with the ``u`` for which ``q . u`` is closest to 1 for all queries.

    The queries of a head have a common mean, so there is such a direction. No bias is left over.
    """
    scaled = (scale * queries).double()
    direction = _solve(scaled.mT @ scaled, scaled.sum(1)[..., None], ridge)[..., 0]  # [H_kv, D]
    return keys + bias[..., None] * direction[:, None].to(keys.dtype)


def fit_values(
    queries: Tensor,
    keys: Tensor,
    output: Tensor,
    own: Tensor,
    scale: float,
    *,
    bias: Tensor | None = None,
    ridge: float = RIDGE,
) -> Tensor:
    """``[H_kv, P, D_v]`` values for which attention over the keys gives ``output [H_kv, n, D_v]``, by least squares.

    ``own [H_kv, P, D_v]`` are the values of the chosen keys, from which the solution goes away only as far as the
    queries ask for it: ``ridge`` times the squared distance is added, relative to the mean of the Gram
    matrix's diagonal.
    """
    scores = scale * (queries @ keys.mT)
    weights = (scores if bias is None else scores + bias[:, None]).softmax(-1)  # [H_kv, n, P]
    left = output - weights @ own
    return own + _solve((weights.mT @ weights).double(), (weights.mT @ left).double(), ridge).to(own.dtype)


def _solve(gram: Tensor, target: Tensor, ridge: float) -> Tensor:
    """The solution of ``(G + r mean(diag G)) x = t``."""
    size = gram.shape[-1]
    mean = gram.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=torch.finfo(gram.dtype).tiny)  # [H]
    loaded = gram + ridge * mean[:, None, None] * torch.eye(size, dtype=gram.dtype, device=gram.device)
    return torch.linalg.solve(loaded, target)


def check_mass(mass: object) -> None:
    """Raise ValueError unless ``mass`` is a way to give the kept keys the attention of all."""
    if mass not in ("bias", "keys", "none"):
        raise fail("mass", repr(mass), "'bias', 'keys' or 'none'")


def _check(queries: Tensor, keys: Tensor, values: Tensor, tokens: int, mass: str, num_first: int) -> None:
    for name, x in (("queries", queries), ("keys", keys), ("values", values)):
        if x.dim() != 3 or x.shape[0] != keys.shape[0] or not x.shape[1]:
            raise fail(name, f"shape {list(x.shape)}", "[H_kv, tokens, D], the same heads for queries, keys and values")
    if queries.shape[2] != keys.shape[2]:
        raise fail("queries", f"shape {list(queries.shape)}", f"[H_kv, n, {keys.shape[2]}], the keys' dimension")
    if values.shape[1] != keys.shape[1]:
        raise fail("values", f"shape {list(values.shape)}", f"[H_kv, {keys.shape[1]}, D_v], one for each key")
    if not 1 <= tokens <= keys.shape[1]:
        raise fail("tokens", tokens, f"1 to {keys.shape[1]}, the tokens of the text")
    check_mass(mass)
    if not 0 <= num_first <= tokens:
        raise fail("num_first", num_first, f"0 to {tokens}, the tokens that are kept")
