"""What holds for every backend of the operator, of the CUDA kernels in the emulator: the forward alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.cuda.emulated.operators import SM80, Emulated, each_route, emulated_param, routes_of
from tests.cuda.test_calls import attend
from tests.support.nan_behind_padding import EMULATED, forward_alone
from tests.support.operator_calls import Call, make_call
from tests.support.operator_cases import CASES, EAGER, EAGER_BANKS, ODD_SHAPES
from tests.support.operator_oracle import assert_within_rule

pytestmark = pytest.mark.usefixtures("poisoned_memory")
DTYPES = (torch.bfloat16, torch.float16)
NAN = float("nan")


def cases(*names: str) -> pytest.MarkDecorator:
    """Parameters ``case, emulated``: these cases, each by all routes that take it."""
    found = each_route((name, CASES[name]()) for name in names)
    return pytest.mark.parametrize(("case", "emulated"), found, indirect=["emulated"])


def run(call: Call) -> dict[str, Tensor]:
    o, lse = attend(call)
    return {"o": o, "lse": lse}


def assert_same(call: Call, clean: dict[str, Tensor]) -> None:
    for name, x in run(call).items():
        assert torch.equal(x, clean[name]), name


# In the usual run one dtype: test_calls.py has all cases in both.
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.exhaustive)])
@cases(*EAGER, *EAGER_BANKS)
def test_error_rule(case: str, dtype: torch.dtype, emulated: Emulated) -> None:
    call = CASES[case]().to(dtype)
    assert_within_rule(run(call), call)


# The forward for many rows takes the shapes of every backend, and decoding the same with few rows and a longer cache.
FORWARD = [(S, S, *rest) for S, *rest in ODD_SHAPES]
DECODING = [(min(S, 2 + S % 11), S, *rest) for S, *rest in ODD_SHAPES]


def shapes() -> list[Any]:
    found: list[Any] = []
    for S, T, P, D, group, B in (*FORWARD, *DECODING):
        call = make_call(B=1, H=1, H_kv=1, S=S, T=T, P=1, D=D)
        found += [emulated_param((S, T, P, D, group, B), route=route) for route in routes_of(call)]
    return found


@pytest.mark.parametrize(("shape", "emulated"), shapes(), indirect=["emulated"])
def test_odd_shapes(shape: tuple[int, ...], emulated: Emulated) -> None:
    S, T, P, D, group, B = shape
    call = make_call(B=B, H=2 * group, H_kv=2, S=S, T=T, P=P, D=D, dtype=torch.bfloat16)
    assert_within_rule(run(call), call)


@pytest.mark.exhaustive
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("emulated", [emulated_param(route=x) for x in ("fused", SM80)], indirect=True)
def test_many_rows(dtype: torch.dtype, emulated: Emulated) -> None:
    call = make_call(B=2, H=8, H_kv=1, S=1000, P=129, D=64, dtype=dtype)
    assert_within_rule(run(call), call)


@pytest.mark.parametrize("bad", [NAN, float("inf")])
@cases("plain", "long_rows", "left_padding", "batch_of_one", "window")
def test_one_sample_never_reaches_another(case: str, bad: float, emulated: Emulated) -> None:
    call = CASES[case]().to(torch.bfloat16)
    clean = run(call)["o"]
    with torch.no_grad():
        for name in ("q", "k", "v"):
            call.leaves[name][-1, :, -1] = bad
    assert torch.equal(run(call)["o"][:-1], clean[:-1])


@pytest.mark.parametrize("P", [7, 150])
@pytest.mark.parametrize("ids", [[2, 0, -1], [[2, 2, -1], [0, 0, 0], [-1, -1, 0]]], ids=["by_sample", "by_token"])
def test_a_prefix_of_the_bank_never_reaches_another(ids: list[Any], P: int, emulated: Emulated) -> None:
    """Nor what lies behind the end of a ragged one."""
    lens = torch.tensor([P - 2, P, P])
    call = make_call(B=3, S=3, N=3, P=P, prefix_ids=torch.tensor(ids), prefix_lens=lens, dtype=torch.bfloat16)
    if emulated.route not in routes_of(call):
        pytest.skip(f"{emulated.route} takes no prefixes by token")
    clean = run(call)
    with torch.no_grad():
        for name in ("prefix_k", "prefix_v"):
            call.leaves[name][1] = NAN
            call.leaves[name][0, :, P - 2 :] = NAN
    assert_same(call, clean)


@pytest.mark.parametrize("packed", [(5, 4, 7), (100, 30, 70)], ids=str)
def test_a_packed_prefix_never_reaches_another(packed: tuple[int, ...], emulated: Emulated) -> None:
    call = make_call(B=3, packed=packed, prefix_ids=torch.tensor([2, 0, -1]), dtype=torch.bfloat16)
    clean = run(call)
    with torch.no_grad():
        for name in ("prefix_k", "prefix_v"):
            call.leaves[name][:, packed[0] : packed[0] + packed[1]] = NAN
    assert_same(call, clean)


@pytest.mark.parametrize("packed", [(1, 0), (0, 1)], ids=str)
def test_a_packed_bank_of_one_token(packed: tuple[int, ...], emulated: Emulated) -> None:
    call = make_call(packed=packed, prefix_ids=torch.tensor([0, 1]), dtype=torch.bfloat16)
    assert_within_rule(run(call), call)


@pytest.mark.parametrize("dtype", DTYPES)
@cases("plain", "sinks", "left_padding", "softcap")
def test_large_scores_stay_finite(case: str, dtype: torch.dtype, emulated: Emulated) -> None:
    call = CASES[case]().to(dtype)
    with torch.no_grad():
        for x in call.leaves.values():
            x.mul_(100.0)
    for name, x in run(call).items():
        assert x.isfinite().all(), name


@cases("plain", "left_padding", "bank_ragged", "bank_packed", "window", "mqa")
def test_two_runs_are_bit_equal(case: str, emulated: Emulated) -> None:
    """Whatever the order of blocks, warps and copies."""
    call = CASES[case]().to(torch.bfloat16)
    first = run(call)
    for emulated.seed in (1, 2):
        assert_same(call, first)


@cases("nothing_at_all", "a_sample_all_padding", "q_start_before_the_keys", "bank_packed_unused")
def test_a_row_without_a_key(case: str, emulated: Emulated) -> None:
    call = CASES[case]().to(torch.bfloat16)
    want_o, want_lse = attend(call, "reference")
    o, lse = attend(call)
    empty = want_lse.isinf()
    assert torch.equal(lse.isinf(), empty) and (lse[empty] < 0).all()
    assert torch.equal(o[empty], torch.zeros_like(o[empty])) and torch.equal(o[empty], want_o[empty])
    assert empty.any() == (case != "bank_packed_unused")


@pytest.mark.parametrize("name", ["k", "v"])
@pytest.mark.parametrize("start", [5, torch.tensor([2, 9])], ids=["one_start", "a_start_each"])
@pytest.mark.parametrize(("S", "T"), [(1, 64), (3, 300)])
def test_slots_of_a_cache_after_the_last_row(S: int, T: int, start: Any, name: str, emulated: Emulated) -> None:
    """A static cache is longer than what was written to it. Decoding reads no slot that no row may see."""
    call = make_call(S=S, T=T, q_start=start, dtype=torch.bfloat16)
    clean = run(call)
    with torch.no_grad():
        for b, first in enumerate(torch.as_tensor(start).expand(2).tolist()):
            call.leaves[name][b, :, first + S :] = NAN
    if emulated.route != "fused" or emulated.capability != 90 or name == "k":
        assert_same(call, clean)
    else:  # it copies whole tiles, and a weight of 0 does not hide a nan: docs/operator.md says so
        assert run(call)["o"].isnan().any()


@pytest.mark.parametrize("name", ["k", "v"])
def test_nan_behind_padding_is_as_the_table_says(name: str, emulated: Emulated) -> None:
    assert forward_alone("cuda", name) == EMULATED["cuda"][name]


@pytest.mark.parametrize(("start", "window"), [(-2, 2**31 - 1), (-9, 2**28), (2**40, 2**28), (-(2**40), 9), (2**62, 9)])
def test_positions_far_from_the_keys(start: int, window: int, emulated: Emulated) -> None:
    call = make_call(S=6, T=9, q_start=start, window=window, dtype=torch.bfloat16)
    assert_within_rule(run(call), call)


@pytest.mark.parametrize(("start", "window"), [(-3, 2**31 - 1), (2**40, 2**31 - 1)])
def test_far_positions_and_a_window_as_wide(start: int, window: int, emulated: Emulated) -> None:
    call = make_call(S=6, T=9, q_start=start, window=window, dtype=torch.bfloat16)
    assert_within_rule(run(call), call)
