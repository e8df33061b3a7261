"""Every wrong call names its argument, says what came and what was expected."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from fastprefix import explain, prefix_attention
from tests.support.operator_calls import make_call

WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "rank": ({"q": torch.randn(6, 5, 16)}, r"q: got shape \[6, 5, 16\], expected \[B, H, S, D\]"),
    "not a tensor": ({"k": [1, 2]}, "k: got list, expected a tensor"),
    "heads do not divide": (
        {"q": torch.randn(2, 5, 5, 16)},
        "k: got 2 heads, expected a number that divides q's 5 heads",
    ),
    "integers": ({"q": torch.ones(2, 6, 5, 16, dtype=torch.long)}, "q: got dtype torch.int64"),
    "dtype mix": (
        {"v": torch.randn(2, 2, 5, 16).half()},
        "v: got dtype torch.float16, expected q's dtype torch.float32",
    ),
    "device mix": ({"k": torch.randn(2, 2, 5, 16, device="meta")}, "k: got device meta, expected q's device cpu"),
    "prefix device": ({"prefix_v": torch.randn(2, 7, 16, device="meta")}, "prefix_v: got device meta"),
    "batch": ({"v": torch.randn(3, 2, 5, 16)}, r"v: got shape \[3, 2, 5, 16\]"),
    "head dim of the prefix": ({"prefix_k": torch.randn(2, 7, 8)}, r"prefix_k: got shape \[2, 7, 8\]"),
    "heads of the prefix": (
        {"prefix_k": torch.randn(6, 7, 16)},
        r"prefix_k: got shape \[6, 7, 16\], expected .* \[2, any, 16\]",
    ),
    "P mismatch": ({"prefix_v": torch.randn(2, 6, 16)}, r"prefix_v: got shape \[2, 6, 16\], expected .* \[2, 7, 16\]"),
    "prefix dtypes": (
        {"prefix_v": torch.randn(2, 7, 16).half()},
        "prefix_v: got dtype torch.float16, expected prefix_k's",
    ),
    "bank without ids": ({"prefix_k": torch.randn(3, 2, 7, 16)}, "prefix_k: .* needs prefix_ids"),
    "ids without bank": (
        {"prefix_ids": torch.tensor([0, 0])},
        r"prefix_k: got shape \[2, 7, 16\], expected \[N, H_kv, P, D\].*packed.*needs prefix_lens",
    ),
    "packed values of another length": (
        {"prefix_ids": torch.tensor([0, 0]), "prefix_lens": torch.tensor([7]), "prefix_v": torch.randn(2, 6, 16)},
        r"prefix_v: got shape \[2, 6, 16\], expected .* \[2, 7, 16\]",
    ),
    "packed without a prefix": (
        {"prefix_ids": torch.tensor([-1, -1]), "prefix_lens": torch.zeros(0, dtype=torch.long)},
        "prefix_lens: got no length, expected a bank of at least one prefix",
    ),
    "packed lengths of two dimensions": (
        {"prefix_ids": torch.tensor([0, 0]), "prefix_lens": torch.tensor([[7]])},
        r"prefix_lens: got shape \[1, 1\], expected \[N\] = \[any\]",
    ),
    "lens without ids": ({"prefix_lens": torch.tensor([1])}, "prefix_lens: got lengths without prefix_ids"),
    "backend": ({"backend": "fastest"}, "backend: got 'fastest', expected 'auto' or 'reference'"),
    "padding dtype": ({"key_padding_mask": torch.ones(2, 5)}, "key_padding_mask: got dtype torch.float32"),
    "padding shape": (
        {"key_padding_mask": torch.ones(2, 4, dtype=torch.bool)},
        r"key_padding_mask: got shape \[2, 4\]",
    ),
    "segments": ({"segment_ids": torch.ones(2, 5)}, "segment_ids: got dtype"),
    "q_start": ({"q_start": 1.5}, "q_start: got float"),
    "q_start shape": ({"q_start": torch.tensor([1, 2, 3])}, r"q_start: got shape \[3\]"),
    "q_start beyond int64": ({"q_start": 10**30}, "q_start: got 1000000000000000000000000000000, expected within"),
    "window beyond int64": ({"window": 2**63}, "window: got 9223372036854775808, expected within"),
    "sparse": ({"q": torch.zeros(2, 6, 5, 16).to_sparse()}, "q: got layout torch.sparse_coo, expected a dense tensor"),
    "sparse bias": ({"bias": torch.zeros(5, 5).to_sparse()}, "bias: got layout torch.sparse_coo"),
    "window": ({"window": 0}, "window: got 0"),
    "window without causal": ({"window": 3, "causal": False}, "window: got a window with causal=False"),
    "softcap": ({"softcap": -1.0}, "softcap: got -1.0, expected a positive finite number"),
    "sinks": ({"sinks": torch.randn(2)}, r"sinks: got shape \[2\], expected \[H\]"),
    "prefix_bias": (
        {"prefix_bias": torch.randn(2, 6)},
        r"prefix_bias: got shape \[2, 6\], expected \[H_kv, P\] = \[2, 7\]",
    ),
    "prefix_bias dtype": ({"prefix_bias": torch.zeros(2, 7, dtype=torch.bool)}, "prefix_bias: got dtype torch.bool"),
    "prefix_bias of a bank": (
        {
            **{name: torch.randn(3, 2, 7, 16) for name in ("prefix_k", "prefix_v")},
            "prefix_ids": torch.tensor([0, 2]),
            "prefix_bias": torch.zeros(2, 7),
        },
        r"prefix_bias: got shape \[2, 7\], expected \[N, H_kv, P\]",
    ),
    "gate": ({"gate": torch.randn(2)}, r"gate: got shape \[2\], expected \[H\] or \[B, H\] = \[6\]"),
    "gate of rows": ({"gate": torch.randn(3, 6)}, r"gate: got shape \[3, 6\], expected \[B, H\] = \[2, 6\]"),
    "bias": ({"bias": torch.randn(4, 5)}, r"bias: got shape \[4, 5\]"),
    "bias dtype": ({"bias": torch.ones(5, dtype=torch.long)}, "bias: got dtype"),
    "dropout": ({"dropout_p": 1.0}, "dropout_p: got 1.0"),
    "scale": ({"scale": "1"}, "scale: got '1', expected a finite number"),
    "scale nan": ({"scale": float("nan")}, "scale: got nan"),
    "softcap inf": ({"softcap": float("inf")}, "softcap: got inf, expected a positive finite number"),
    "softcap bool": ({"softcap": True}, "softcap: got True"),
    "no heads": ({"q": torch.randn(2, 0, 5, 16)}, "q: got shape .*, expected at least one head"),
    "causal": ({"causal": None}, "causal: got None"),
    "causal a tensor": ({"causal": torch.ones(2) > 0, "window": 3}, "causal: got tensor"),
    "return_lse": ({"return_lse": torch.ones(2)}, r"return_lse: got tensor\(\[1., 1.\]\), expected True or False"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_call(what: str) -> None:
    changed, message = WRONG[what]
    call = {**make_call().leaves, **changed}
    with pytest.raises(ValueError, match=message) as error:
        prefix_attention(**call)
    assert re.match(r"\w+: got .+, expected .+", str(error.value))
    # A call without gradients is first looked at in C++, which must leave a wrong one to the same words.
    with torch.no_grad(), pytest.raises(ValueError) as direct:
        prefix_attention(**{"backend": "native", **call})
    assert str(direct.value) == str(error.value)


@pytest.mark.parametrize(
    ("ids", "lens", "message"),
    [
        ([3, 0], None, "prefix_ids: got 0..3, expected -1..2"),
        ([-2, 0], None, "prefix_ids"),
        ([0, 1], [8, 1, 1], "prefix_lens"),
    ],
)
def test_wrong_bank(ids: list[int], lens: list[int] | None, message: str) -> None:
    options = {"prefix_ids": torch.tensor(ids), "prefix_lens": None if lens is None else torch.tensor(lens)}
    with pytest.raises(ValueError, match=message):
        prefix_attention(**make_call(N=3).leaves, **options)


@pytest.mark.parametrize(
    ("ids", "lens", "message"),
    [
        ([2, 0], [3, 4], r"prefix_ids: got 0..2, expected -1..1"),
        ([0, 1], [3, 5], r"prefix_lens: got \[3, 5\], expected .* add up to prefix_k's 7 tokens"),
        ([0, 1], [3, 3], r"prefix_lens: got \[3, 3\], expected .* add up to"),
        ([0, 1], [8, -1], r"prefix_lens: got \[8, -1\], expected lengths of 0 and more"),
    ],
)
def test_wrong_packed_bank(ids: list[int], lens: list[int], message: str) -> None:
    options = {"prefix_ids": torch.tensor(ids), "prefix_lens": torch.tensor(lens)}
    with pytest.raises(ValueError, match=message):
        prefix_attention(**make_call(P=7).leaves, **options)
    with pytest.raises(ValueError, match=message):
        explain(**make_call(P=7).leaves, **options)


def test_a_packed_bank_is_explained() -> None:
    call = make_call(packed=(3, 0, 4), prefix_ids=torch.tensor([2, -1]))
    assert re.search(r"^(native|aten) +chosen by auto", explain(**call.leaves, **call.options), re.M)


def test_explain_checks_too() -> None:
    with pytest.raises(ValueError, match="softcap"):
        explain(**make_call().leaves, softcap=0)
    with pytest.raises(TypeError, match="windows"):
        explain(**make_call().leaves, windows=3)
