"""Folding the batch into rows: its inverse, views where they are promised, and the same numbers however it is cut."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastprefix.backends import aten, fold_batch
from fastprefix.types import AttentionArgs, Needs
from tests.support.operator_calls import Call, make_call, run
from tests.support.operator_oracle import assert_close


@pytest.mark.parametrize("B,S,H,H_kv", [(4, 20, 6, 2), (4, 3, 6, 2), (1, 3, 6, 2), (3, 20, 4, 4)])
@pytest.mark.parametrize("lanes", [1, 2, 64])
@pytest.mark.parametrize("packed", [True, False])
def test_unfold_inverts_fold(
    B: int, S: int, H: int, H_kv: int, packed: bool, lanes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: lanes)
    args = AttentionArgs(**make_call(B=B, S=S, H=H, H_kv=H_kv).leaves, scale=1.0)
    (prefix,) = fold_batch.prefix_rows(args, packed)
    folded = fold_batch.fold(args.q, prefix)
    assert folded.shape[0] == prefix.chunks and folded.numel() == args.q.numel()
    assert torch.equal(fold_batch.unfold(folded, H, prefix).transpose(1, 2), args.q)
    if prefix.heads == H:
        assert folded.data_ptr() == args.q.data_ptr(), "the promised view is a copy"


@pytest.mark.parametrize(
    ("B", "H_kv", "lanes", "chunks"),
    [(8, 3, 2, 2), (8, 4, 2, 1), (8, 3, 1, 1), (7, 3, 2, 2), (16, 8, 64, 8), (2, 2, 64, 1)],
)
def test_chunks_fill_the_lanes(B: int, H_kv: int, lanes: int, chunks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: lanes)
    args = AttentionArgs(**make_call(B=B, S=20, H=2 * H_kv, H_kv=H_kv).leaves, scale=1.0)
    assert next(fold_batch.prefix_rows(args, packed=False)).chunks == chunks


@pytest.mark.parametrize("lanes", [2, 64])
def test_the_cut_changes_no_numbers(lanes: int, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call = make_call(B=6, S=20, H_kv=3, dtype=torch.float64)
    want = run(call, backend)
    monkeypatch.setattr(torch, "get_num_threads", lambda: lanes)
    assert_close(run(call, backend), want, 1e-12)


def _args(call: Call) -> AttentionArgs:
    return AttentionArgs(**{n: x.detach() for n, x in call.leaves.items()}, **call.options, scale=0.25)


# Ids, lengths, and the calls wanted: prefixes and tokens of each.
CUTS: dict[str, tuple[list[int], list[int], list[tuple[int, int]]]] = {
    "one each": ([0, 1, 2, 3], [6, 6, 6, 6], [(4, 6)]),
    "two each": ([1, 1, 2, 2], [3, 6, 6], [(2, 6)]),
    "every other": ([0, 2, 4], [4, 1, 4, 1, 4], [(3, 4)]),
    "the longest last": ([0, 1, 2, 3], [2, 2, 2, 9], [(3, 2), (1, 9)]),
    "downwards": ([2, 1, 0], [4, 4, 4], [(1, 4), (1, 4), (1, 4)]),
    "unevenly many": ([0, 0, 1], [4, 4], [(1, 4), (1, 4)]),
    "one without": ([0, -1, 1], [4, 4], [(1, 4), (1, 4)]),
    "an empty one": ([0, 1, 2], [4, 0, 4], [(1, 4), (1, 4)]),
}


@pytest.mark.parametrize("form", ["packed", "padded"])
@pytest.mark.parametrize("name", CUTS)
def test_equal_neighbours_are_one_call_of_views(name: str, form: str) -> None:
    ids, lens, want = CUTS[name]
    shape: dict[str, Any] = {"packed": lens} if form == "packed" else {"N": len(lens), "P": max(lens)}
    call = make_call(B=len(ids), S=33, prefix_ids=torch.tensor(ids), **shape)
    call.options["prefix_lens"] = torch.tensor(lens)
    args = _args(call)
    found = list(fold_batch.prefix_rows(args, packed=False))
    assert [(x.group.prefixes, x.group.length) for x in found] == want
    banks = {x.untyped_storage().data_ptr() for x in (args.prefix_k, args.prefix_v)}
    for prefix in found:
        assert {x.untyped_storage().data_ptr() for x in prefix.keys_values(args)} <= banks
        assert fold_batch.fold(args.q, prefix).untyped_storage().data_ptr() == args.q.untyped_storage().data_ptr()


@pytest.mark.parametrize("ids", [[0, 1, 0, 1], [[0, 1, 1, 0], [1, 1, -1, 0]]])
def test_what_lies_apart_is_gathered_once(ids: list[Any]) -> None:
    call = make_call(B=len(ids), S=4, packed=[3, 3], prefix_ids=torch.tensor(ids))
    args = _args(call)
    assert sorted(x.group.prefixes for x in fold_batch.prefix_rows(args, packed=True)) in ([2], [1, 1])
    together = torch.cat([torch.as_tensor(x.group.units) for x in fold_batch.prefix_rows(args, packed=True)])
    assert len(set(together.tolist())) == len(together) == (torch.tensor(ids) >= 0).sum()


class _Largest(TorchDispatchMode):
    """Numbers in the largest storage that an op made."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.untyped_storage().nbytes() // x.element_size())
        return out


@pytest.mark.parametrize("ids", [[0, 1, 2, 3, 4, 5, 6, 7], [7, 0, 7, 1, 2, 7, -1, 3]])
def test_nothing_is_padded(ids: list[int]) -> None:
    """One long prefix among short ones: no tensor has room for all as long as that."""
    args = _args(make_call(B=8, H=2, H_kv=2, S=5, D=16, packed=[4] * 7 + [512], prefix_ids=torch.tensor(ids)))
    with _Largest() as largest:
        o, lse = aten.fwd(args)
        aten.bwd(args, o, lse, torch.ones_like(o), Needs(True, True, True, True, True))
    assert 0 < largest.numel <= args.prefix_k.numel() == 2 * 540 * 16
