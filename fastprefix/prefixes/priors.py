"""Distributions from which a soft prompt's embeddings start (Sedov et al. 2024, arXiv:2412.18582).

Where prompts start decides where they end, in the paper's experiments, and not how low the loss gets. ``fitted``,
``exclusion`` and ``interpolation`` are made of the model's own vocabulary, which is read when the prompt is attached.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastprefix.errors import fail
from fastprefix.prefixes.init import MOST_COMMON, Init
from fastprefix.validation import is_int

Embed = Callable[[Tensor], Tensor]  # token ids [n] to their embeddings [n, d]
_CHUNK = 4096  # tokens of the vocabulary, or samples, at a time


class Gaussian(NamedTuple):
    """A normal distribution ``N(mean, covariance)``, the covariance by its eigenvalues; all in fp64.

    Directions without any variance are left out: there are r of the others.
    """

    mean: Tensor  # [d]
    variances: Tensor  # [r], ascending
    directions: Tensor  # [d, r], orthonormal

    @property
    def dim(self) -> int:
        """Number r of directions with variance."""
        return len(self.variances)

    def mahalanobis(self, x: Tensor) -> Tensor:
        """``[n]``, the distance of ``x [n, d]`` from the mean in standard deviations; about ``sqrt(r)`` of a sample.

        What of ``x - mean`` lies in directions without variance is not counted.
        """
        along = (x.double() - self.mean) @ self.directions
        return (along / self.variances.sqrt()).norm(dim=-1)

    def place(self, z: Tensor) -> Tensor:
        """``[n, d]``, the points that lie at ``z [n, r]`` standard deviations from the mean."""
        return self.mean + (z * self.variances.sqrt()) @ self.directions.T


def fit_gaussian(embed: Embed, size: int, device: torch.device) -> Gaussian:
    """The normal distribution with the mean and covariance of the embeddings of the ids ``0 .. size - 1``.

    The vocabulary is read in chunks, twice, and ``[d, d]`` is held.
    """

    def chunks() -> list[Tensor]:
        return [torch.arange(i, min(i + _CHUNK, size), device=device) for i in range(0, size, _CHUNK)]

    mean = sum((embed(ids).double().sum(0) for ids in chunks()), torch.zeros((), dtype=torch.float64, device=device))
    mean = mean / size
    covariance = torch.zeros(len(mean), len(mean), dtype=torch.float64, device=device)
    for ids in chunks():
        off = embed(ids).double() - mean
        covariance += off.T @ off
    variances, directions = torch.linalg.eigh(covariance / size)
    kept = variances > len(mean) * torch.finfo(torch.float64).eps * variances[-1].clamp(min=0.0)
    if not bool(kept.any()):
        raise fail("init", "a vocabulary whose embeddings are all equal", "one with a covariance")
    return Gaussian(mean, variances[kept], directions[:, kept])


def xavier() -> Init:
    """Uniform entries within ``sqrt(6 / (P + d))`` of 0 (Glorot & Bengio 2010), for a soft prompt ``[P, d]``."""
    return Init("xavier", prior="xavier")


def fitted() -> Init:
    """Draws from the normal distribution with the mean and covariance of the model's vocabulary, for a soft prompt.

    The embeddings are as the layers read them, after a scaling if the model has one. ``[d, d]`` is decomposed in fp64.
    """
    return Init("fitted", prior="fitted")


def exclusion(ratio: float = 5.0) -> Init:
    """Draws from around the vocabulary, and from outside of it, for a soft prompt.

    With the fitted ``N(mu, Sigma)`` of :func:`fitted`, candidates are drawn from the wider ``N(mu, c Sigma)`` with
    ``c = ratio^(2 / d)``, whose density at the mean is ``ratio`` times lower. One is accepted with the probability
    ``max(0, 1 - p / p_wide)`` of the two densities. All that is accepted has a squared Mahalanobis distance above
    ``2 ln(ratio) / (1 - 1 / c)`` from the mean. The share that is accepted is the total variation distance of the two.

    Args:
        ratio: above 1; the paper's is 5.
    """
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 1.0 < ratio < math.inf:
        raise fail("ratio", repr(ratio), "a finite number above 1")
    return Init("exclusion", prior="exclusion", ratio=float(ratio))


def interpolation(most_common: int = MOST_COMMON) -> Init:
    """Points between two tokens, ``a x + (1 - a) y`` with ``a`` uniform in [0, 1], for a soft prompt.

    Args:
        most_common: the tokens are drawn from the first ``most_common`` ids, as by :func:`vocabulary`.
    """
    if not is_int(most_common) or most_common < 1:
        raise fail("most_common", repr(most_common), "an int of at least 1")
    return Init("interpolation", prior="interpolation", nearby=most_common)


def exclusion_bound(dim: int, ratio: float = 5.0) -> float:
    """The smallest squared Mahalanobis distance that :func:`exclusion` accepts in ``dim`` dimensions."""
    return 2.0 * math.log(ratio) / -math.expm1(-2.0 / dim * math.log(ratio))


def exclusion_acceptance(dim: int, ratio: float = 5.0) -> float:
    """The share of candidates that :func:`exclusion` accepts: of the mass beyond its bound, the wide one's surplus."""
    half, bound = torch.tensor(dim / 2.0, dtype=torch.float64), exclusion_bound(dim, ratio)
    wide = ratio ** (2.0 / dim)
    beyond = [torch.special.gammaincc(half, torch.tensor(x / 2.0, dtype=torch.float64)) for x in (bound / wide, bound)]
    return float(beyond[0] - beyond[1])


def draw(init: Init, num_virtual_tokens: int, dim: int, embed: Embed, vocab_size: int, device: torch.device) -> Tensor:
    """``[P, d]`` fp32 of one of this module's starts, from torch's generator."""
    P = num_virtual_tokens
    if init.prior == "xavier":
        return (2.0 * torch.rand(P, dim) - 1.0).to(device) * math.sqrt(6.0 / (P + dim))
    if init.prior == "interpolation":
        assert init.nearby is not None
        pair = torch.randint(min(init.nearby, vocab_size), (2, P))
        share = torch.rand(P, 1).to(device)
        x, y = (embed(ids.to(device)).float() for ids in pair)
        return share * x + (1.0 - share) * y
    gaussian = fit_gaussian(embed, vocab_size, device)
    rows = torch.randn(P, gaussian.dim, dtype=torch.float64)
    if init.prior == "exclusion":
        rows = _outside(P, gaussian.dim, init.ratio)
    return gaussian.place(rows.to(device)).float()


def _outside(count: int, dim: int, ratio: float) -> Tensor:
    """``[count, dim]`` accepted candidates of :func:`exclusion` around 0 with the covariance 1."""
    wide, found = ratio ** (2.0 / dim), list[Tensor]()
    block = max(16, min(_CHUNK, 2**22 // dim))
    while sum(map(len, found)) < count:
        candidates = math.sqrt(wide) * torch.randn(block, dim, dtype=torch.float64)
        squares = candidates.square().sum(1)
        narrow = ratio * torch.exp(-0.5 * squares * (1.0 - 1.0 / wide))  # p / p_wide
        found.append(candidates[torch.rand(block, dtype=torch.float64) < 1.0 - narrow])
    return torch.cat(found)[:count]
