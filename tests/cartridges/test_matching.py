"""The closed form: exact where every token is kept, optimal against perturbations, and its parts against formulas."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastprefix.cartridges import matching

H, N, T, D, P = 2, 60, 24, 8, 6
SCALE = D**-0.5


def problem(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Queries with a common mean, as a model's have; keys and values; fp64."""
    draw = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(H, n, D, generator=draw, dtype=torch.float64) for n in (N, T, T))
    return q + 1.0, k, v


def explicit(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    scores = SCALE * q @ k.mT + (0.0 if bias is None else bias[:, None])
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


@pytest.mark.parametrize("mass", ["bias", "keys", "none"])
def test_keeping_every_token_keeps_attention_exactly(mass: str) -> None:
    q, k, v = problem()
    found = matching.match(q, k, v, T, SCALE, mass=mass)
    assert found.places.tolist() == [list(range(T))] * H
    for a, b in zip(explicit(q, found.keys, found.values, found.bias), explicit(q, k, v), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    torch.testing.assert_close(found.values, v, rtol=0, atol=1e-6)


def test_attention_over_the_text_is_that_of_the_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = problem()
    monkeypatch.setattr(matching, "_SCORES", H * T * 7)  # queries in several parts
    found = matching.attend(q, k, v, SCALE)
    o, lse = explicit(q, k, v)
    torch.testing.assert_close(found.output, o)
    torch.testing.assert_close(found.lse, lse)
    torch.testing.assert_close(found.mass, (SCALE * q @ k.mT).softmax(-1).square().mean(1).sqrt())


def test_the_keys_of_the_largest_mass_are_kept_and_the_first() -> None:
    mass = torch.tensor([[0.0, 0.3, 0.1, 0.5, 0.2]])
    assert matching.choose(mass, 3).tolist() == [[0, 1, 3]]
    assert matching.choose(mass, 3, num_first=0).tolist() == [[1, 3, 4]]


@pytest.mark.parametrize("with_bias", [False, True])
def test_no_other_values_come_closer(with_bias: bool) -> None:
    """Least squares against a brute-force search around its solution, and against torch's."""
    q, k, v = problem()
    bias = torch.linspace(-1, 1, P, dtype=torch.float64).expand(H, P) if with_bias else None
    target, _ = explicit(q, k, v)
    kept, own = k[:, :P], v[:, :P]
    values = matching.fit_values(q, kept, target, own, SCALE, bias=bias, ridge=0.0)

    def error(x: Tensor) -> float:
        return float((explicit(q, kept, x, bias)[0] - target).square().sum())

    best, draw = error(values), torch.Generator().manual_seed(1)
    for size in (1e-3, 1e-1):
        for _ in range(50):
            moved = values + size * torch.randn(values.shape, generator=draw, dtype=torch.float64)
            assert error(moved) > best
    assert error(own) > best
    weights = (SCALE * q @ kept.mT + (0.0 if bias is None else bias[:, None])).softmax(-1)
    torch.testing.assert_close(values, torch.linalg.lstsq(weights, target).solution, rtol=1e-6, atol=1e-8)


def test_a_ridge_draws_the_values_to_the_texts_own() -> None:
    q, k, v = problem()
    target, _ = explicit(q, k, v)
    found = [matching.fit_values(q, k[:, :P], target, v[:, :P], SCALE, ridge=ridge) for ridge in (0.0, 1.0, 1e9)]
    far = [float((x - v[:, :P]).norm()) for x in found]
    assert far[0] > far[1] > far[2] and far[2] < 1e-6 * far[0]


def test_weights_are_the_non_negative_least_squares() -> None:
    """By the conditions that decide it: no slope where a weight is free, and none that would lower one at the bound."""
    draw = torch.Generator().manual_seed(0)
    a = torch.rand(H, N, P, generator=draw, dtype=torch.float64)
    true = torch.tensor([2.0, 0.0, 1.0, 0.5, 0.0, 3.0], dtype=torch.float64)
    target = (a @ true) + 0.1 * torch.randn(H, N, generator=draw, dtype=torch.float64)
    gram, sums = a.mT @ a, (a.mT @ target[..., None])[..., 0]
    w = matching.non_negative(gram, sums, 1e-3, 20000)
    slope = (gram @ w[..., None])[..., 0] - sums
    bound = w <= 1e-3 * (1 + 1e-9)
    assert bool((w >= 1e-3).all()) and bool(bound.any()) and not bool(bound.all())
    assert float(slope[~bound].abs().max()) < 1e-5 and float(slope[bound].min()) > -1e-5


def mass_error(q: Tensor, k: Tensor, lse: Tensor, bias: Tensor | None = None) -> float:
    scores = SCALE * q @ k.mT + (0.0 if bias is None else bias[:, None])
    return float(((scores.logsumexp(-1) - lse).exp() - 1.0).square().mean())


def test_biases_and_moved_keys_bring_back_the_mass() -> None:
    q, k, v = problem()
    lse = explicit(q, k, v)[1]
    found = {mass: matching.match(q, k, v, P, SCALE, mass=mass) for mass in ("none", "bias", "keys")}
    errors = {mass: mass_error(q, x.keys, lse, x.bias) for mass, x in found.items()}
    assert errors["bias"] < 0.2 * errors["none"] and errors["keys"] < 0.7 * errors["none"]
    assert found["keys"].bias is None and found["bias"].bias is not None
    assert torch.equal(found["bias"].keys, k.take_along_dim(found["bias"].places[..., None], 1))
    moved = found["bias"].bias + 0.2 * torch.randn(
        H, P, generator=torch.Generator().manual_seed(2), dtype=torch.float64
    )
    assert mass_error(q, found["bias"].keys, lse, moved) > errors["bias"]


def test_a_bias_is_folded_exactly_where_a_direction_gives_it() -> None:
    """Queries with one coordinate that never changes: a shift of the keys in it is a bias."""
    q, k, _ = problem()
    q[..., 0] = 3.0
    bias = torch.linspace(-2, 2, T, dtype=torch.float64).expand(H, T)
    folded = matching.fold_bias(q, k, bias, SCALE, ridge=1e-12)
    torch.testing.assert_close(SCALE * q @ folded.mT, SCALE * q @ k.mT + bias[:, None], rtol=0, atol=1e-6)


WRONG = {
    "tokens": ({"tokens": T + 1}, "tokens: got 25, expected 1 to 24"),
    "no tokens": ({"tokens": 0}, "tokens: got 0"),
    "mass": ({"mass": "some"}, "mass: got 'some', expected 'bias', 'keys' or 'none'"),
    "first": ({"num_first": 7}, "num_first: got 7, expected 0 to 6"),
    "heads": ({"queries": torch.zeros(1, 3, D)}, r"queries: got shape \[1, 3, 8\]"),
    "dimension": ({"queries": torch.zeros(H, 3, 4)}, r"queries: got shape \[2, 3, 4\]"),
    "no queries": ({"queries": torch.zeros(H, 0, D)}, r"queries: got shape \[2, 0, 8\]"),
    "values": ({"values": torch.zeros(H, 3, D)}, r"values: got shape \[2, 3, 8\], expected \[H_kv, 24, D_v\]"),
}


@pytest.mark.parametrize(("given", "message"), WRONG.values(), ids=WRONG)
def test_wrong_arguments_are_named(given: dict[str, object], message: str) -> None:
    q, k, v = problem()
    arguments: dict[str, object] = {"queries": q, "keys": k, "values": v, "tokens": P, "scale": SCALE, **given}
    with pytest.raises(ValueError, match=message):
        matching.match(**arguments)  # type: ignore[arg-type]
