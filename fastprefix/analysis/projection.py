"""Points in two dimensions, and how well groups of points are told apart."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Projected(NamedTuple):
    """Points in the plane of their largest variance."""

    points: Tensor  # [n, 2]
    explained: Tensor  # [2], each axis's share of the variance


def pca(x: Tensor, fit: Tensor | None = None) -> Projected:
    """The first two principal components of ``x [n, d]``, in fp64.

    Args:
        x: the points.
        fit: the points whose mean and components are taken, ``[m, d]``; default ``x``. ``explained`` is of these.

    The sign of a component is such that its largest loading is positive.
    """
    x = x.double()
    fit = x if fit is None else fit.double()
    mean = fit.mean(0)
    _, values, right = torch.linalg.svd(fit - mean, full_matrices=False)
    axes = torch.nn.functional.pad(right[:2], (0, 0, 0, max(0, 2 - len(right))))
    largest = axes.gather(1, axes.abs().argmax(1, keepdim=True))
    axes = torch.where(largest < 0.0, -axes, axes)
    squares = torch.nn.functional.pad(values.square(), (0, max(0, 2 - len(values))))
    total = squares.sum().clamp(min=torch.finfo(squares.dtype).tiny)
    return Projected((x - mean) @ axes.T, squares[:2] / total)


def silhouette(x: Tensor, labels: Tensor) -> float:
    """The mean silhouette of points ``[n, d]`` in groups ``[n]``, from -1 to 1 (Rousseeuw 1987).

    A point's is ``(b - a) / max(a, b)``, with its mean distance ``a`` from the others of its group, and ``b`` from
    those of the nearest other group; 0 for the only point of a group. nan where there is one group.
    """
    groups = labels.unique()
    if len(groups) < 2:
        return float("nan")
    distance = torch.cdist(x.double(), x.double(), compute_mode="donot_use_mm_for_euclid_dist")  # [n, n]
    member = labels[:, None] == groups  # [n, groups]
    sums, counts = distance @ member.double(), member.sum(0)
    own = sums[member] / (counts[member.int().argmax(1)] - 1).clamp(min=1)
    other = (sums / counts).masked_fill(member, torch.inf).amin(1)
    scores = (other - own) / torch.maximum(other, own).clamp(min=torch.finfo(torch.float64).tiny)
    return float(scores.masked_fill(counts[member.int().argmax(1)] == 1, 0.0).mean())


def two_groups(centres: Tensor) -> list[int]:
    """A group 0 or 1 of each of ``[n, d]`` points, the first in group 0: the split whose squared distances are least.

    Every split is tried for up to 12 points; beyond, those by the order along the first principal component.
    """
    n = len(centres)
    if n < 2:
        return [0] * n
    if n <= 12:
        splits = [[(code >> i) & 1 for i in range(n)] for code in range(2, 2**n, 2)]
    else:
        order = pca(centres).points[:, 0].argsort().tolist()
        splits = [[int(order.index(i) >= cut) for i in range(n)] for cut in range(1, n)]

    def spread(split: list[int]) -> float:
        parts = (centres[[i for i in range(n) if split[i] == group]].double() for group in (0, 1))
        return float(sum((part - part.mean(0)).square().sum() for part in parts))

    best = min(splits, key=spread)
    return best if best[0] == 0 else [1 - group for group in best]
