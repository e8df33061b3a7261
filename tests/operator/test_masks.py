"""Visible keys of content, entry by entry."""

from __future__ import annotations

import pytest
import torch

from fastprefix.masks import visible_keys
from fastprefix.types import AttentionArgs
from tests.support.operator_calls import make_call
from tests.support.operator_cases import padding


@pytest.mark.parametrize("q_start", [None, 0, 3, torch.tensor(2), torch.tensor([0, 4])])
@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("padded", [False, True])
def test_entries(q_start: object, window: int | None, padded: bool) -> None:
    call = make_call(S=4, T=8)
    mask = padding(2, 8, "left") if padded else None
    args = AttentionArgs(**call.leaves, scale=1.0, q_start=q_start, window=window, key_padding_mask=mask)  # type: ignore[arg-type]
    visible = visible_keys(args)
    assert visible is not None
    full = visible.expand(2, 1, 4, 8)
    for b in range(2):
        start = 4 if q_start is None else int(torch.as_tensor(q_start).reshape(-1)[-1 if b else 0])
        for i in range(4):
            for j in range(8):
                want = (
                    j <= start + i and (window is None or j > start + i - window) and (mask is None or bool(mask[b, j]))
                )
                assert bool(full[b, 0, i, j]) == want, (b, i, j)


def test_nothing_hidden_is_none() -> None:
    assert visible_keys(AttentionArgs(**make_call().leaves, scale=1.0, causal=False)) is None
