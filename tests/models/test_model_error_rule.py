"""The error rule of models catches what it is to catch, and knows the models that leave fp64."""

from __future__ import annotations

import pytest
import torch

from tests.model_zoo.architectures import ROWS
from tests.support.model_error_rule import StayingInDouble, assert_model_rule

IDS = torch.arange(3, 12).reshape(1, -1)


def test_a_model_that_leaves_fp64_computes_something_else_inside_the_block() -> None:
    model = ROWS["nemotron"].build(torch.float64)
    eager = model(input_ids=IDS).logits
    with StayingInDouble():
        truth = model(input_ids=IDS).logits
    difference = (eager - truth).abs().max().item()
    assert 1e-9 < difference < 1e-3


def test_an_error_of_another_kind_is_caught() -> None:
    truth = [torch.ones(3, dtype=torch.float64)]
    eager = [truth[0] + 3e-7]
    assert_model_rule([truth[0] + 1.5e-6], eager, truth)
    with pytest.raises(AssertionError, match="number 0: error 1"):
        assert_model_rule([truth[0] + 1e-5], eager, truth)
    with pytest.raises(AssertionError, match="shapes"):
        assert_model_rule([truth[0][:2]], eager, truth)
