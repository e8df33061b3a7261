"""One vendor call or two in `aten`: the same numbers whichever is taken, and the one that was measured to be faster."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastprefix.backends import concatenated_prefix
from fastprefix.types import AttentionArgs
from tests.support.operator_calls import make_call, run
from tests.support.operator_cases import CASES, EAGER
from tests.support.operator_oracle import assert_close, assert_within_rule, truth


@pytest.mark.parametrize("one_call", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_either_way_is_right(case: str, one_call: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(concatenated_prefix, "preferred", lambda args: one_call and concatenated_prefix.possible(args))
    call = CASES[case]().to(torch.float64)
    assert_close(run(call, "aten"), truth(call), 1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("case", EAGER)
def test_one_call_keeps_the_error_rule(case: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(concatenated_prefix, "preferred", concatenated_prefix.possible)
    call = CASES[case]().to(dtype)
    assert_within_rule(run(call, "aten"), call)


@pytest.mark.parametrize(
    ("S", "T", "P", "one_call"),
    [
        (64, 64, 16, True),
        (256, 256, 64, True),
        (64, 64, 512, False),
        (1024, 1024, 16, False),
        (1, 64, 16, True),
        (1, 64, 9000, False),
        (1, 9000, 16, False),
    ],
)
def test_the_measured_choice(S: int, T: int, P: int, one_call: bool) -> None:
    assert concatenated_prefix.preferred(AttentionArgs(**make_call(S=S, T=T, P=P).leaves, scale=1.0)) is one_call
    bank = make_call(S=S, T=T, P=P, N=2, prefix_ids=torch.tensor([0, 1]))
    assert not concatenated_prefix.preferred(AttentionArgs(**bank.leaves, **bank.options, scale=1.0))


@pytest.mark.parametrize(
    "hidden",
    [
        {"key_padding_mask": torch.ones(2, 64, dtype=torch.bool)},
        {"window": 63},
        {"q_start": 62},
        {"q_start": torch.tensor([0, 1])},
    ],
)
def test_a_step_of_decoding_that_would_need_a_mask(hidden: dict[str, Any]) -> None:
    call = make_call(S=1, T=64, P=16, **hidden)
    assert not concatenated_prefix.preferred(AttentionArgs(**call.leaves, **call.options, scale=1.0))
