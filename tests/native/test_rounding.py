"""How fp32 sums are rounded: a product of two rows, or a sum over many rows, is no single chain of additions.

The error rule is kept with room to spare, on calls of which a chain of 128 additions was beyond it.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastprefix import prefix_attention
from fastprefix.backends import native as backend
from fastprefix.types import INPUTS, AttentionArgs
from fastprefix.verification.checks.error_rule import ALL, eager, truth, worst_error

pytestmark = pytest.mark.usefixtures("native")

ENOUGH = 0.75  # of what the rule allows


def normals(seed: int) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator)


def in_a_chain(terms: Tensor) -> Tensor:
    """The sum over the last dimension, one addition after the other."""
    total = torch.zeros_like(terms[..., 0])
    for i in range(terms.shape[-1]):
        total = total + terms[..., i]
    return total


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


@pytest.mark.parametrize("D", [64, 80, 128, 256])
def test_scores_are_more_exact_than_a_chain(D: int) -> None:
    """The log-sum-exp of a row that sees one key is its score."""
    normal = normals(D)
    q, k = normal(1, 1, 2000, D), normal(1, 1, D)
    nothing = normal(1, 1, 0, D)
    _, lse = prefix_attention(q, nothing, nothing, k, k, scale=1.0, return_lse=True, backend="native")
    right = (q[0, 0].double() * k[0].double()).sum(-1)
    assert rms(lse.flatten() - right) < 0.75 * rms(in_a_chain(q[0, 0] * k[0]) - right)


def test_sums_over_rows_are_more_exact_than_a_chain() -> None:
    """The weight of the only key is 1, so the gradient of its value is the sum of do's rows."""
    normal = normals(0)
    q, nothing = normal(1, 1, 4000, 16), normal(1, 1, 0, 16)
    k, v = normal(1, 1, 16), normal(1, 1, 16).requires_grad_()
    do = torch.rand(1, 1, 4000, 16, generator=torch.Generator().manual_seed(1))
    o = prefix_attention(q, nothing, nothing, k, v, backend="native")
    (found,) = torch.autograd.grad(o, v, do)
    right = do[0, 0].double().sum(0)
    assert rms(found.flatten() - right) < 0.1 * rms(in_a_chain(do[0, 0].T) - right)


# Seed, B, H_kv, G, S, T, P, D and whether the content is causal.
CALLS = [
    (794, 3, 1, 2, 67, 107, 40, 128, True),
    (261, 1, 1, 1, 128, 128, 7, 128, False),
    (650, 3, 1, 8, 98, 138, 40, 128, True),
]


@pytest.mark.parametrize("call", CALLS)
def test_gradients_are_well_within_the_error_rule(call: tuple[int, ...]) -> None:
    """Given the exact o and lse, rounded once: what is wrong with the gradients is the backward's own error."""
    seed, B, H_kv, G, S, T, P, D, causal = call
    normal = normals(10000 + seed)
    q, k, v, do = (normal(B, n, h, D).transpose(1, 2) for n, h in ((S, H_kv * G), (T, H_kv), (T, H_kv), (S, H_kv * G)))
    prefix_k, prefix_v = normal(H_kv, P, D), normal(H_kv, P, D)
    args = AttentionArgs(q, k, v, prefix_k, prefix_v, scale=D**-0.5, causal=bool(causal))
    want, rounded = truth(args, do), eager(args, do)
    grads = backend.bwd(args, want["o"].float(), want["lse"].float(), do, ALL)
    found = {f"d{name}": x for name, x in zip(INPUTS, grads, strict=False) if x is not None}
    share, about = worst_error(found, want, rounded)
    assert share < ENOUGH, (share, about)
