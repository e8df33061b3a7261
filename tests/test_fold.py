"""Folding the batch into rows: its inverse, views where they are promised, and the same numbers however it is cut."""

from __future__ import annotations

import pytest
import torch

from fastprefix.backends import fold
from fastprefix.types import AttentionArgs
from tests.helpers import assert_close, make_call, run


@pytest.mark.parametrize("B,S,H,H_kv", [(4, 20, 6, 2), (4, 3, 6, 2), (1, 3, 6, 2), (3, 20, 4, 4)])
@pytest.mark.parametrize("lanes", [1, 2, 64])
def test_unfold_inverts_fold(B: int, S: int, H: int, H_kv: int, lanes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: lanes)
    args = AttentionArgs(**make_call(B=B, S=S, H=H, H_kv=H_kv).leaves, scale=1.0)
    (prefix,) = fold.prefixes(args)
    folded = fold.fold(args.q, prefix)
    assert folded.shape[0] == prefix.chunks and folded.numel() == args.q.numel()
    assert torch.equal(fold.unfold(folded, args.q, prefix, 0.0), args.q)
    if prefix.heads == H:
        assert folded.data_ptr() == args.q.data_ptr(), "the promised view is a copy"


@pytest.mark.parametrize(
    ("B", "H_kv", "lanes", "chunks"),
    [(8, 3, 2, 2), (8, 4, 2, 1), (8, 3, 1, 1), (7, 3, 2, 7), (16, 8, 64, 8), (2, 2, 64, 2)],
)
def test_chunks_fill_the_lanes(B: int, H_kv: int, lanes: int, chunks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: lanes)
    args = AttentionArgs(**make_call(B=B, S=20, H=2 * H_kv, H_kv=H_kv).leaves, scale=1.0)
    assert next(fold.prefixes(args)).chunks == chunks


@pytest.mark.parametrize("lanes", [2, 64])
def test_the_cut_changes_no_numbers(lanes: int, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call = make_call(B=6, S=20, H_kv=3, dtype=torch.float64)
    want = run(call, backend)
    monkeypatch.setattr(torch, "get_num_threads", lambda: lanes)
    assert_close(run(call, backend), want, 1e-12)
