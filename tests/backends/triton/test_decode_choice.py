"""Which calls the decoding kernels take, and how they order rows by the prefix that each reads."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from fastprefix._triton.flat_rows import count_rows, flat_rows

from fastprefix.backends.launch import launcher, split_kv_decode
from fastprefix.backends.launch.prefix_bank import rows_by_prefix, unit_is_token
from fastprefix.types import AttentionArgs
from tests.support.operator_calls import arguments, make_call


def llama_call(**shape: Any) -> AttentionArgs:
    """A call of Llama's size."""
    given = {"B": 1, "H": 32, "H_kv": 8, "S": 1, "T": 512, "P": 16, "D": 128, **shape}
    B, H, H_kv, S, T, P, D = (given[name] for name in ("B", "H", "H_kv", "S", "T", "P", "D"))
    q, k, prefix = (
        torch.empty(*size, D, device="meta", dtype=torch.bfloat16) for size in ((B, H, S), (B, H_kv, T), (H_kv, P))
    )
    return AttentionArgs(q, k, k, prefix, prefix, scale=1.0, window=given.get("window"))


@pytest.mark.parametrize(
    ("shape", "want"),
    [
        ({"T": 8192}, True),  # eight programs on 132 multiprocessors
        ({"T": 64, "P": 4096}, True),
        ({}, False),  # nothing to split
        ({"T": 8192, "window": 128}, False),
        ({"B": 64, "T": 8192}, False),  # full, and next to no prefix
        ({"B": 256, "P": 2048}, True),  # full, and the prefix read 256 times
        ({"B": 256, "P": 16}, False),
        ({"B": 256, "P": 2048, "S": 17}, False),
        ({"T": 8192, "S": 16, "H_kv": 1}, True),
        ({"B": 256, "P": 2048, "S": 16}, True),
        ({"B": 256, "P": 2048, "S": 16, "H_kv": 4}, False),  # full tiles
        ({"B": 0, "T": 8192}, False),
    ],
)
def test_preferred(shape: dict[str, Any], want: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "num_sms", lambda x: 132)
    assert split_kv_decode.preferred(llama_call(**shape)) is want


@triton.jit
def _rows_kernel(out, order, n, first, B, S, G: tl.constexpr, UNIT_IS_TOKEN: tl.constexpr, BLOCK_M: tl.constexpr):
    i = tl.arange(0, BLOCK_M)
    b, s, g, valid = flat_rows(order, n, first, B, S, G, UNIT_IS_TOKEN, BLOCK_M)
    tl.store(out + i, tl.where(valid, (b * S + s) * G + g, -1))
    tl.store(out + BLOCK_M, count_rows(order, n, B, S, G, UNIT_IS_TOKEN))


@pytest.mark.skipif(not launcher.INTERPRETER, reason="judged by Triton's interpreter")
@pytest.mark.parametrize("ids", [None, [2, -1, 0, 2], [[2, -1], [0, 2], [2, 2], [-1, -1]]])
def test_rows_by_prefix(ids: list[Any] | None) -> None:
    """Each row of a prefix once, in ascending order, and no other."""
    wanted = None if ids is None else torch.tensor(ids)
    call = make_call(B=4, H=3, H_kv=1, S=2, N=None if ids is None else 4, prefix_ids=wanted)
    args = arguments(call)
    found = rows_by_prefix(args)
    each = torch.zeros(4, 2, dtype=torch.long) if wanted is None else wanted.view(4, -1).expand(4, 2)
    for n in range(1 if ids is None else 4):
        rows = []
        for first in (0, 16):
            out = torch.empty(17, dtype=torch.int32)
            _rows_kernel[(1,)](out, found, n, first, 4, 2, G=3, UNIT_IS_TOKEN=unit_is_token(args), BLOCK_M=16)
            rows += [x for x in out[:16].tolist() if x >= 0]
        assert rows == (each.flatten().repeat_interleave(3) == n).nonzero().flatten().tolist()
        assert out[16] == len(rows)
