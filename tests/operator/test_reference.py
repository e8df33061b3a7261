"""The oracle against loops over rows, and its written-out backward against autograd through its forward."""

from __future__ import annotations

import pytest
import torch

from fastprefix import reference
from fastprefix.types import AttentionArgs, Needs
from tests.support.operator_calls import make_call, run
from tests.support.operator_cases import CASES
from tests.support.operator_oracle import assert_close, brute_force


@pytest.mark.parametrize("case", CASES)
def test_equals_brute_force(case: str) -> None:
    call = CASES[case]().to(torch.float64)
    assert_close(run(call, "reference"), brute_force(call), 1e-12)


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_backward_equals_autograd_through_the_forward(dropout_p: float) -> None:
    call = make_call(dtype=torch.float64, S=6)
    options = {"softcap": 1.5, "dropout_p": dropout_p, "dropout_seed": torch.tensor(7)}
    args = AttentionArgs(**call.leaves, scale=0.4, **options)
    o, lse = reference.attention(args)
    do = torch.randn_like(o)
    want = torch.autograd.grad(o, list(call.leaves.values()), do)
    got = reference.bwd(args, o, lse, do, Needs(True, True, True, True, True))
    for name, a, b in zip(call.leaves, got, want, strict=False):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12, msg=lambda m, n=name: f"d{n}: {m}")


def test_dropout_drops_and_keeps_the_mean() -> None:
    call = make_call(B=1, H=1, H_kv=1, S=1, T=1, P=3, dtype=torch.float64, causal=False)
    plain = run(call, "reference")["o"]
    call.options["dropout_p"] = 0.5
    draws = torch.stack([run(call, "reference")["o"] for _ in range(400)])
    assert draws.flatten(1).unique(dim=0).shape[0] > 4
    torch.testing.assert_close(draws.mean(0), plain, rtol=0, atol=5 * draws.std(0).max().item() / 20)
