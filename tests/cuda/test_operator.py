"""What the operators themselves check, whoever calls them: each complaint names the argument."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.cuda.conftest import NAMESPACE

pytestmark = pytest.mark.usefixtures("plain")
NAMES = (
    "q", "k", "v", "prefix_k", "prefix_v", "sinks", "key_padding_mask", "segment_ids", "q_start_tensor", "prefix_ids",
    "prefix_lens", "prefix_bias", "q_start", "causal", "scale", "window", "softcap", "route",
)  # fmt: skip


def inputs(**changed: Any) -> list[Any]:
    def some(*shape: int) -> Tensor:
        return torch.randn(*shape).bfloat16()

    found = dict.fromkeys(NAMES)
    found |= {"q": some(2, 4, 3, 16), "k": some(2, 2, 5, 16), "v": some(2, 2, 5, 8)}
    found |= {"prefix_k": some(2, 7, 16), "prefix_v": some(2, 7, 8)}
    found |= {"q_start": 2, "causal": True, "scale": 0.25, "window": 0, "softcap": 0.0, "route": 0}
    return list({**found, **changed}.values())


def some(*shape: int) -> Tensor:
    return torch.zeros(*shape).bfloat16()


def whole(*shape: int) -> Tensor:
    return torch.zeros(*shape, dtype=torch.long)


BANK = {"prefix_k": some(3, 2, 7, 16), "prefix_v": some(3, 2, 7, 8), "prefix_ids": whole(2)}
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"q": some(4, 3, 16)}, r"q: got 3 dimensions, expected \[B, H, S, D\]"),
    ({"q": torch.zeros(2, 4, 3, 16)}, "q: got dtype float32, expected bfloat16 or float16"),
    ({"q": some(2, 4, 3, 12)}, "head dim: got 12 and 8, expected multiples of 8"),
    ({"q": some(2, 4, 3, 17)[..., 1:]}, "q: got the stride 204, expected a multiple of 8 elements"),
    ({"k": some(2, 3, 5, 16)}, "k: got 3 heads, expected a divisor of q's 4"),
    ({"k": some(2, 2, 5, 8)}, r"k: got sizes \[2, 2, 5, 8\], expected \[2, 2, 5, 16\]"),
    ({"k": some(2, 2, 5, 16).half()}, "k: got dtype float16, expected bfloat16"),
    ({"k": some(2, 2, 16, 5).mT}, "k: got the last stride 5, expected 1"),
    ({"v": some(2, 2, 6, 8)}, r"v: got sizes \[2, 2, 6, 8\], expected \[2, 2, 5, 8\]"),
    ({"prefix_v": some(14 * 8 + 4)[4:].view(2, 7, 8)}, "prefix_v: got an address off by some bytes"),
    ({"prefix_k": some(2, 6, 16)}, r"prefix_v: got sizes \[2, 7, 8\], expected \[2, 6, 8\]"),
    ({**BANK, "prefix_ids": None}, "prefix_ids: got none, expected some"),
    ({**BANK, "prefix_ids": whole(3)}, r"prefix_ids: got sizes \[3\], expected \[2\]"),
    ({**BANK, "prefix_ids": whole(2, 2)}, r"prefix_ids: got sizes \[2, 2\], expected \[2, 3\]"),
    ({**BANK, "prefix_ids": whole(2).to(torch.int16)}, "prefix_ids: got dtype number 2, expected int32 or int64"),
    ({**BANK, "prefix_lens": whole(2)}, r"prefix_lens: got sizes \[2\], expected \[3\]"),
    ({"prefix_ids": whole(2)}, "prefix_lens: got none, expected lengths"),
    ({"prefix_lens": whole(1)}, "prefix_lens: got lengths without prefix_ids"),
    ({"q_start_tensor": whole(3)}, r"q_start: got sizes \[3\], expected \[2\]"),
    ({"sinks": torch.zeros(3)}, r"sinks: got sizes \[3\], expected \[4\]"),
    ({"sinks": some(4)}, "sinks: got dtype bfloat16, expected float32"),
    ({"sinks": torch.zeros(8)[::2]}, "sinks: got the stride 2, expected 1"),
    ({"prefix_bias": torch.zeros(2, 6)}, r"prefix_bias: got sizes \[2, 6\], expected \[2, 7\]"),
    ({**BANK, "prefix_bias": torch.zeros(2, 7)}, r"prefix_bias: got sizes \[2, 7\], expected \[3, 2, 7\]"),
    ({"prefix_bias": some(2, 7)}, "prefix_bias: got dtype bfloat16, expected float32"),
    ({"prefix_bias": torch.zeros(7, 2).t()}, "prefix_bias: got the stride 2, expected 1"),
    ({**BANK, "prefix_bias": torch.zeros(2, 3, 7).transpose(0, 1)}, "prefix_bias: got the stride 21, expected 7"),
    ({"key_padding_mask": torch.ones(2, 4, dtype=torch.uint8)}, r"key_padding_mask: got sizes \[2, 4\]"),
    ({"key_padding_mask": torch.ones(2, 5, dtype=torch.bool)}, "key_padding_mask: got dtype bool, expected uint8"),
    ({"window": 2**31}, "window: got 2147483648, expected a whole number from 0 to 2147483647"),
    ({"route": 3}, r"route: got 3, expected 0 \(auto\), 1 \(split_kv\) or 2 \(cascade\)"),
]


@pytest.mark.parametrize(("changed", "told"), WRONG, ids=[told[:40] for _, told in WRONG])
def test_a_wrong_call_names_the_argument(changed: dict[str, Any], told: str) -> None:
    for name in ("decode", "decode_route"):
        with pytest.raises(RuntimeError, match=told):
            getattr(getattr(torch.ops, NAMESPACE), name)(*inputs(**changed))


def test_a_right_call() -> None:
    """Or the refusals above would prove nothing."""
    of_bank = {**BANK, "prefix_bias": torch.zeros(3, 2, 7)}
    by_row = {**BANK, "prefix_ids": whole(2, 3), "prefix_lens": whole(3).int()}
    for changed in ({}, BANK, of_bank, by_row, {"route": 2}, {"prefix_bias": torch.zeros(2, 7)}):
        o, lse = getattr(torch.ops, NAMESPACE).decode(*inputs(**changed))
        assert o.shape == (2, 4, 3, 8) and lse.shape == (2, 4, 3) and o.isfinite().all()


def test_no_gradient_of_a_bias_that_is_not_there() -> None:
    o, lse, needs = some(2, 4, 3, 8), torch.zeros(2, 4, 3), [False] * 5
    with pytest.raises(RuntimeError, match="prefix_bias: got none, expected one, as its gradient is asked for"):
        getattr(torch.ops, NAMESPACE).backward(*inputs(), o, lse, o, *needs, True)


def test_nothing_to_compute() -> None:
    o, lse = getattr(torch.ops, NAMESPACE).decode(*inputs(q=some(0, 4, 3, 16), k=some(0, 2, 5, 16), v=some(0, 2, 5, 8)))
    assert o.shape == (0, 4, 3, 8) and lse.shape == (0, 4, 3)
