"""Inputs at the edge of what a call may be, where fp32 arithmetic of its own or a raw address could go wrong."""

from __future__ import annotations

import enum
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastprefix import prefix_attention
from tests.support.operator_calls import Call, make_call, run
from tests.support.operator_oracle import assert_close

pytestmark = pytest.mark.usefixtures("native")
LOWEST = torch.finfo(torch.float32).min


def plain(call: Call) -> dict[str, Tensor]:
    return {name: x.detach() for name, x in call.leaves.items()}


@pytest.mark.parametrize(
    ("ids", "lens"), [([0, 3], None), ([0, 10**6], None), ([-2, 0], None), ([0, 1], [1, 30, 2]), ([0, 1], [1, -1, 2])]
)
def test_values_that_a_compiled_call_could_not_check(ids: list[int], lens: list[int] | None) -> None:
    """Whose first use would be an address."""
    call = make_call(N=3)

    torch._dynamo.reset()  # other tests count towards its limit of recompilations

    @torch.compile(backend="eager", fullgraph=True)
    def compiled(ids: Tensor, lens: Tensor | None) -> Any:
        return prefix_attention(**call.leaves, prefix_ids=ids, prefix_lens=lens, backend="native")

    with pytest.raises(ValueError, match=r"prefix_(ids|lens): got -?\d+, expected"):
        compiled(torch.tensor(ids), None if lens is None else torch.tensor(lens))


def test_a_packed_bank_is_not_read_past_its_end() -> None:
    call = make_call(packed=(3, 4))
    call.options["prefix_lens"] = torch.tensor([3, 5])

    torch._dynamo.reset()  # other tests count towards its limit of recompilations

    @torch.compile(backend="eager", fullgraph=True)
    def compiled(ids: Tensor) -> Any:
        return prefix_attention(**call.leaves, **call.options, prefix_ids=ids, backend="native")

    with pytest.raises(ValueError, match="prefix_lens: got 5, expected lengths within 7 tokens"):
        compiled(torch.tensor([0, 1]))


def test_gradients_of_another_shape_are_refused() -> None:
    call = make_call()
    with torch.no_grad():
        o, lse = prefix_attention(**call.leaves, return_lse=True, backend="native")
    options = [None] * 9 + [None, True, 0.25, None, None, 0.0, False, "native"]
    for change, message in (
        ((o[:1], lse, o), "o: expected"),
        ((o, lse[:1], o), "lse: expected"),
        ((o, lse, o[:1]), "do:"),
    ):
        with torch.no_grad(), pytest.raises(ValueError, match=message):
            torch.ops.fastprefix.prefix_attn_bwd(*plain(call).values(), *options, *change, [True] * 5 + [False] * 3)


def test_lazy_tensors_are_read_by_their_values() -> None:
    x = plain(make_call())
    bias = torch.randn(5, 5, dtype=torch.cfloat).conj().imag  # lazily negated
    assert bias.is_neg()
    for changed in (
        {"bias": bias},
        {"q": torch._neg_view(x["q"])},
        {"prefix_v": torch._neg_view(x["prefix_v"])},
        {"q": torch._efficientzerotensor(x["q"].shape)},
    ):
        found = prefix_attention(**{**x, **changed}, backend="native")
        torch.testing.assert_close(found, prefix_attention(**{**x, **changed}, backend="reference"))


def test_numbers_of_other_classes() -> None:
    call = make_call()
    with torch.no_grad():
        expected = prefix_attention(**call.leaves, softcap=5.0, window=2, backend="reference")
        number = enum.IntEnum("Number", "one two").two  # type: ignore[attr-defined]
        found = prefix_attention(**call.leaves, softcap=np.float64(5.0), window=number, backend="native")
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("sink", [LOWEST, -2.4e38, torch.finfo(torch.bfloat16).min, 3e38, float("inf"), -float("inf")])
def test_sinks_as_far_as_numbers_go(sink: float) -> None:
    """Also of rows that see nothing, whose lse is the sink."""
    call = make_call(S=3, T=3, P=0, q_start=-1, sinks=torch.full((6,), sink))
    found, expected = run(call, "native"), run(call, "reference")
    for name, value in found.items():
        assert not value.isnan().any(), name
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"bias": torch.full((40, 40), 2.4e38)},
        {"bias": torch.full((40, 40), LOWEST)},
        {"softcap": 3e38},
        {"softcap": 1e-46},
        {"softcap": 1e-30},
    ],
)
def test_finite_arguments_give_finite_results(options: dict[str, Any]) -> None:
    for S in (1, 40):
        call = make_call(S=S, T=40, **{n: x[:S] if isinstance(x, Tensor) else x for n, x in options.items()})
        found = run(call, "native")
        for name, value in found.items():
            assert not value.isnan().any(), name
        # At 2.4e38 no lse can hold the number of keys; the reference divides by it, these kernels by their sum.
        if "bias" not in options:
            torch.testing.assert_close(found["o"], run(call, "reference")["o"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [30.0, 300.0, 3e4, 1e8])
def test_large_scores_have_right_gradients(size: float) -> None:
    """A row's softmax is one key's; what is subtracted from its score must be the score to the last bit."""
    call = make_call(S=40, P=4)
    for name in ("q", "k", "prefix_k"):
        call.leaves[name] = (call.leaves[name].detach() * size).requires_grad_()
    found, expected = run(call, "native"), run(call, "reference")
    for name in ("o", "dv", "dprefix_v"):
        assert_close({name: found[name]}, {name: expected[name]}, 1e-4)
    assert all(x.isfinite().all() for x in found.values())
