"""Every backend against truth: o, lse and all gradients, over every argument, dtype and awkward shape."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastprefix import prefix_attention
from tests.support.operator_calls import GENERAL, backend_params, backends_of, interpreted, make_call, run
from tests.support.operator_cases import CASES, EAGER, EAGER_BANKS, ODD_SHAPES
from tests.support.operator_oracle import assert_close, assert_within_rule, truth

pytestmark = pytest.mark.usefixtures("poisoned_memory")
in_fp64 = pytest.mark.parametrize("backend", backend_params(backends_of(torch.float64)))
in_bf16 = pytest.mark.parametrize("backend", backend_params(backends_of(torch.bfloat16)))


def in_dtypes(*dtypes: torch.dtype) -> pytest.MarkDecorator:
    """Parameters ``dtype, backend``: every backend in each of the dtypes that it computes."""
    pairs = [
        pytest.param(dtype, backend, marks=pytest.mark.slow if interpreted(backend) else ())
        for dtype in dtypes
        for backend in backends_of(dtype)
    ]
    return pytest.mark.parametrize(("dtype", "backend"), pairs)


def test_which_backends_compute_in_which_dtypes() -> None:
    for dtype in (torch.float16, torch.float32):
        assert backends_of(dtype) == list(GENERAL)
    for dtype in (torch.bfloat16, torch.float64):
        assert {"reference", "aten"} <= set(backends_of(dtype))


@in_fp64
@pytest.mark.parametrize("case", CASES)
def test_fp64(case: str, backend: str) -> None:
    call = CASES[case]().to(torch.float64)
    assert_close(run(call, backend), truth(call), 1e-10)


@pytest.mark.parametrize("backend", GENERAL)  # in the quick run too, as the one look that it takes at the kernels
@pytest.mark.parametrize("case", CASES)
def test_fp32(case: str, backend: str) -> None:
    """Near the truth and, where eager can compute the case, within the error rule too."""
    call = CASES[case]().to(torch.float32)
    got = run(call, backend)
    assert_close(got, truth(call), 1e-5)
    if case in (*EAGER, *EAGER_BANKS):
        assert_within_rule(got, call)


@in_dtypes(torch.float16, torch.bfloat16)
@pytest.mark.parametrize("case", [*EAGER, *EAGER_BANKS])
def test_error_rule(case: str, dtype: torch.dtype, backend: str) -> None:
    call = CASES[case]().to(dtype)
    assert_within_rule(run(call, backend), call)


@pytest.mark.parametrize(("S", "P", "D", "group", "B"), ODD_SHAPES)
def test_odd_shapes(S: int, P: int, D: int, group: int, B: int, backend: str) -> None:
    call = make_call(B=B, H=2 * group, H_kv=2, S=S, P=P, D=D)
    assert_within_rule(run(call, backend), call)


@pytest.mark.slow
@in_dtypes(torch.float16, torch.bfloat16, torch.float32)
def test_many_rows(dtype: torch.dtype, backend: str) -> None:
    """A thousand rows of eight heads; of Triton's interpreter fewer, across the same boundaries.

    Its tiles hold 128 rows of a group, 64 keys and 32 prefix tokens (``tiles/interpreter.json``). 200 rows of eight
    heads fill 12 tiles and a half of the next, 200 keys three and an eighth, 129 tokens four and one token more.
    """
    call = make_call(B=2, H=8, H_kv=1, S=200 if interpreted(backend) else 1000, P=129, D=64, dtype=dtype)
    assert_within_rule(run(call, backend), call)


@in_fp64
def test_a_sink_that_is_off_in_an_empty_row_gets_no_gradient(backend: str) -> None:
    call = CASES["sinks_off_in_an_empty_row"]().to(torch.float64)
    call.options["sinks"].requires_grad_()
    got = run(call, backend)
    assert all(x.isfinite().all() for name, x in got.items() if name != "lse")
    assert torch.equal(got["dsinks"], torch.zeros(6, dtype=torch.float64))


@in_fp64
@pytest.mark.parametrize("case", ["plain", "left_padding", "bank_ragged", "bank_packed", "sinks", "with_a_cache"])
def test_gradcheck(case: str, backend: str) -> None:
    call = CASES[case]().to(torch.float64)
    run(call, backend)
    names = list(call.leaves)

    def f(*leaves: torch.Tensor) -> torch.Tensor:
        return prefix_attention(**dict(zip(names, leaves, strict=True)), **call.options, backend=backend)

    assert torch.autograd.gradcheck(f, tuple(call.leaves.values()), fast_mode=True)


@in_bf16
@pytest.mark.parametrize("prefix_dtype", [torch.float32, torch.float16, torch.float64])
def test_the_prefix_keeps_its_own_dtype(prefix_dtype: torch.dtype, backend: str) -> None:
    call = make_call(dtype=torch.bfloat16)
    for name in ("prefix_k", "prefix_v"):
        call.leaves[name] = call.leaves[name].detach().to(prefix_dtype).requires_grad_()
    got = run(call, backend)
    assert got["o"].dtype == torch.bfloat16
    assert got["dprefix_k"].dtype == got["dprefix_v"].dtype == prefix_dtype
    same = call.to(torch.bfloat16)
    for name, x in run(same, backend).items():
        torch.testing.assert_close(got[name].float(), x.float(), rtol=1e-2, atol=1e-2)


@in_fp64
@pytest.mark.parametrize("layout", ["bhsd", "bshd", "every_other", "last_dim_strided"])
def test_any_strides(layout: str, backend: str) -> None:
    call = make_call(S=40, dtype=torch.float64)
    want = run(call, backend)

    def lay(x: torch.Tensor) -> torch.Tensor:
        x = x.detach()
        match layout:
            case "bhsd":
                y = x.contiguous()
            case "bshd":
                y = x.transpose(1, 2).contiguous().transpose(1, 2)
            case "every_other":
                y = torch.stack([x, torch.full_like(x, float("nan"))], 3).flatten(2, 3)[:, :, ::2]
            case _:
                y = x.transpose(2, 3).contiguous().transpose(2, 3)
        return y.requires_grad_()

    for name in ("q", "k", "v"):
        call.leaves[name] = lay(call.leaves[name])
    assert_close(run(call, backend), want, 1e-12)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("case", ["plain", "long_rows", "left_padding", "batch_of_one", "window"])
def test_one_sample_never_reaches_another(bad: float, case: str, backend: str) -> None:
    call = CASES[case]().to(torch.float32)
    clean = run(call, backend)["o"]
    with torch.no_grad():
        for name in ("q", "k", "v"):
            call.leaves[name][-1, :, -1] = bad
    dirty = run(call, backend)["o"]
    torch.testing.assert_close(dirty[:-1], clean[:-1], rtol=0, atol=0)


def test_a_prefix_of_the_bank_never_reaches_another_sample(backend: str) -> None:
    call = make_call(B=3, N=3, prefix_ids=torch.tensor([2, 0, -1]), prefix_lens=torch.tensor([5, 7, 7]))
    clean = run(call, backend)
    with torch.no_grad():
        for name in ("prefix_k", "prefix_v"):
            call.leaves[name][1] = float("nan")
            call.leaves[name][0, :, 5:] = float("nan")
    for name, x in run(call, backend).items():
        torch.testing.assert_close(x, clean[name], rtol=0, atol=0)


def test_a_packed_prefix_never_reaches_another_sample(backend: str) -> None:
    call = make_call(B=3, packed=(5, 4, 7), prefix_ids=torch.tensor([2, 0, -1]))
    clean = run(call, backend)
    with torch.no_grad():
        for name in ("prefix_k", "prefix_v"):
            call.leaves[name][:, 5:9] = float("nan")
    for name, x in run(call, backend).items():
        torch.testing.assert_close(x, clean[name], rtol=0, atol=0)
        if name.startswith("dprefix"):
            assert torch.equal(x[:, 5:9], torch.zeros_like(x[:, 5:9])), "a gradient for what nobody reads"
    with torch.no_grad():
        call.leaves["q"][0] = float("nan")
    got = run(call, backend)
    assert got["dprefix_k"][:, :9].isfinite().all() and got["dprefix_k"][:, 9:].isnan().any()
    assert torch.equal(got["o"][1:], clean["o"][1:])


IDS = {"by sample": [1, 3, -1, 0, 1], "by token": [[1, 1, 3, 3], [0, 3, 0, -1], [3] * 4, [-1] * 4, [2, 2, 1, 0]]}


@pytest.mark.parametrize("ids", IDS.values(), ids=list(IDS))
def test_a_packed_bank_is_the_padded_one(ids: list[Any], backend: str) -> None:
    lens = (3, 20, 0, 6)
    call = make_call(B=5, S=4, packed=lens, prefix_ids=torch.tensor(ids), dtype=torch.float32)
    got = run(call, backend)
    starts = [sum(lens[:n]) for n in range(4)]
    for name in ("prefix_k", "prefix_v"):
        bank = torch.full((4, 2, 20, 16), float("nan"))
        for n, start in enumerate(starts):
            bank[n, :, : lens[n]] = call.leaves[name].detach()[:, start : start + lens[n]]
        call.leaves[name] = bank.requires_grad_()
    want = run(call, backend)
    for name in ("dprefix_k", "dprefix_v"):
        want[name] = torch.cat([want[name][n, :, : lens[n]] for n in range(4)], 1)
    assert_close(got, want, 2e-6)


def test_a_packed_bank_is_each_prefix_alone(backend: str) -> None:
    lens, ids = (3, 20, 6), [1, 2, 0, 1]
    call = make_call(B=4, S=20, T=25, packed=lens, prefix_ids=torch.tensor(ids))
    whole = run(call, backend)
    want = {name: torch.zeros_like(x) for name, x in whole.items()}
    for sample, n in enumerate(ids):
        row, token = slice(sample, sample + 1), slice(sum(lens[:n]), sum(lens[: n + 1]))
        part = {name: x.detach()[row] if name in "qkv" else x.detach()[:, token] for name, x in call.leaves.items()}
        part = {name: x.requires_grad_() for name, x in part.items()}
        o, lse = prefix_attention(**part, return_lse=True, backend=backend)
        weight = torch.sin(torch.arange(whole["o"].numel(), dtype=torch.float64) * 0.7).view_as(whole["o"]).to(o.dtype)
        grads = torch.autograd.grad(o, list(part.values()), weight[row])
        want["o"][row], want["lse"][row] = o.detach(), lse
        for name, grad in zip(part, grads, strict=True):
            place = want[f"d{name}"]
            if name in "qkv":
                place[row] = grad
            else:
                place[:, token] += grad
    assert_close(whole, want, 2e-6)


@in_bf16
def test_a_packed_bank_keeps_its_own_dtype(backend: str) -> None:
    """fp32 masters under a bf16 model, each read in the model's dtype."""
    call = make_call(B=3, packed=(5, 0, 9), prefix_ids=torch.tensor([2, 0, 2]), dtype=torch.bfloat16)
    want = run(call, backend)
    for name in ("prefix_k", "prefix_v"):
        call.leaves[name] = call.leaves[name].detach().float().requires_grad_()
    got = run(call, backend)
    assert got["dprefix_k"].dtype == got["dprefix_v"].dtype == torch.float32
    for name, x in got.items():
        torch.testing.assert_close(x.float(), want[name].float(), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("case", ["plain", "sinks", "left_padding"])
def test_large_scores_stay_finite(case: str, backend: str) -> None:
    call = CASES[case]().to(torch.float32)
    with torch.no_grad():
        for x in call.leaves.values():
            x.mul_(100.0)
    for name, x in run(call, backend).items():
        assert x.isfinite().all(), name


@pytest.mark.parametrize("case", ["plain", "left_padding", "bank_ragged", "bank_packed", "window"])
def test_two_runs_are_bit_equal(case: str, backend: str) -> None:
    first, second = (run(CASES[case]().to(torch.float32), backend) for _ in range(2) if torch.manual_seed(0))
    for name, x in first.items():
        assert torch.equal(x, second[name]), name
