"""The short prefix beside a vendor kernel: merged in place, and its backward added in place."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from torch import Tensor

from fastprefix import reference
from fastprefix.types import AttentionArgs, Needs
from tests.support.operator_calls import Call, arguments, make_call
from tests.support.operator_cases import CASES, EAGER
from tests.support.operator_oracle import assert_close, assert_within_rule, truth

pytest.importorskip("triton")

from fastprefix.backends.launch import epilogue, launcher

pytestmark = [pytest.mark.usefixtures("poisoned_memory"), pytest.mark.slow]

ALL = Needs(True, True, True, True, True)
CONTENT = Needs(True, True, True, False, False)


def whole(call: Call) -> AttentionArgs:
    """The call's arguments; skips where the kernels cannot take them here."""
    args = arguments(call)
    if epilogue.reasons(args):
        pytest.skip("; ".join(epilogue.reasons(args)))
    return args


def content_only(args: AttentionArgs) -> AttentionArgs:
    """What a vendor kernel is given: neither prefix nor sinks."""
    nothing = {name: getattr(args, name).flatten(0, -3)[: args.k.shape[1], :0] for name in ("prefix_k", "prefix_v")}
    return dataclasses.replace(args, **nothing, prefix_ids=None, prefix_lens=None, sinks=None)


def merged(args: AttentionArgs, prefix_lse: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Content by the reference, in the call's dtype, then the epilogue."""
    o, lse = reference.fwd(content_only(args))
    # Vendor kernels leave anything finite in a row that saw nothing.
    o = o.masked_fill((lse == float("-inf")).unsqueeze(-1), 1e3)
    found = epilogue.fwd(args, o, lse, prefix_lse)
    assert found[0] is o, "not in place"
    return found


def weight(o: Tensor) -> Tensor:
    """The output's gradient that operator_calls.run takes."""
    return torch.sin(torch.arange(o.numel(), dtype=torch.float64) * 0.7).view(o.shape).to(o.dtype)


def results(call: Call) -> dict[str, Tensor]:
    """o, lse and the three gradients that the prefix has a share in."""
    args = whole(call)
    o, lse = merged(args)
    do = weight(o)
    dq = reference.bwd(content_only(args), o, lse, do, CONTENT).q
    assert dq is not None and not epilogue.bwd_reasons(args)
    got, dprefix_k, dprefix_v = epilogue.bwd(args, o, lse, do, dq, ALL)
    assert got is dq and dprefix_k is not None and dprefix_v is not None, "not in place"
    return {"o": o, "lse": lse, "dq": dq, "dprefix_k": dprefix_k, "dprefix_v": dprefix_v}


# S, query heads a key/value head, D, P, B.
SHAPES = [
    (1, 1, 64, 1, 1),
    (1, 3, 80, 16, 3),
    (1, 4, 64, 7, 5),
    (63, 1, 128, 7, 2),
    (63, 3, 80, 16, 1),
    (64, 4, 16, 32, 2),
    (130, 1, 64, 31, 2),
    (130, 4, 64, 1, 1),
]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(("S", "groups", "D", "P", "B"), SHAPES)
def test_error_rule(S: int, groups: int, D: int, P: int, B: int, dtype: torch.dtype) -> None:
    call = make_call(B=B, H=2 * groups, H_kv=2, S=S, D=D, P=P, dtype=dtype)
    assert_within_rule(results(call), call)


@pytest.mark.parametrize("case", [case for case in EAGER if "bias" not in case and case != "no_content"])
def test_every_argument(case: str) -> None:
    call = CASES[case]().to(torch.float32)
    assert_within_rule(results(call), call)


@pytest.mark.parametrize(("D", "D_v"), [(80, 24), (1, 5)])
def test_values_of_another_width(D: int, D_v: int) -> None:
    call = make_call(S=33, D=D, D_v=D_v, P=9)
    assert_within_rule(results(call), call)


def test_more_tokens_than_a_tile() -> None:
    """The forward walks through any number of them, the backward holds the gradients of one tile."""
    call = make_call(S=80, P=33)
    args = whole(call)
    assert_within_rule(dict(zip(("o", "lse"), merged(args), strict=True)), call)
    assert epilogue.bwd_reasons(args) == ["prefix: more tokens than one tile's registers hold the gradients of"]


@pytest.mark.parametrize("processors", [1, 4, 132])
def test_however_the_rows_are_split(processors: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "num_sms", lambda x: processors)
    call = make_call(B=3, S=70, P=16, dtype=torch.float16)
    assert_within_rule(results(call), call)


def test_two_runs_are_bit_equal() -> None:
    first, second = (results(make_call(S=63, dtype=torch.float16)) for _ in range(2) if torch.manual_seed(0))
    for name, x in first.items():
        assert torch.equal(x, second[name]), name


@pytest.mark.parametrize("layout", ["bhsd", "fused", "every_other", "last_dim_strided"])
def test_any_strides(layout: str) -> None:
    call = make_call(S=20)
    args = whole(call)
    o, lse = merged(args)
    do = weight(o)
    want = epilogue.bwd(args, o, lse, do, torch.ones_like(args.q), ALL)

    def lay(x: Tensor) -> Tensor:
        match layout:
            case "bhsd":
                return x.contiguous()
            case "fused":
                return torch.stack([x, x, x], 1)[:, 1]
            case "every_other":
                return torch.stack([x, torch.full_like(x, float("nan"))], 3).flatten(2, 3)[:, :, ::2]
            case _:
                return x.transpose(2, 3).contiguous().transpose(2, 3)

    same = dataclasses.replace(args, q=lay(args.q), prefix_k=args.prefix_k.transpose(1, 2).contiguous().transpose(1, 2))
    content_o, content_lse = reference.fwd(content_only(args))
    got_o, got_lse = epilogue.fwd(same, lay(content_o), content_lse.transpose(1, 2).contiguous().transpose(1, 2))
    assert torch.equal(got_o, o) and torch.equal(got_lse, lse)
    got = epilogue.bwd(same, lay(o), lse, lay(do), lay(torch.ones_like(args.q)), ALL)
    for x, y in zip(got, want, strict=True):
        assert x is not None and y is not None and torch.equal(x, y)


def test_an_expanded_gradient() -> None:
    args = whole(make_call(S=20))
    o, lse = merged(args)
    do = torch.ones(1).expand(o.shape)
    got, want = (epilogue.bwd(args, o, lse, x, torch.zeros_like(args.q), ALL) for x in (do, do.contiguous()))
    assert all(x is not None and y is not None and torch.equal(x, y) for x, y in zip(got, want, strict=True))


def test_no_samples() -> None:
    args = whole(make_call(B=0))
    o, lse = merged(args)
    dq, dprefix_k, dprefix_v = epilogue.bwd(args, o, lse, o, None, ALL)
    assert dq is not None and dq.shape == args.q.shape
    for x, like in ((dprefix_k, args.prefix_k), (dprefix_v, args.prefix_v)):
        assert x is not None and torch.equal(x, torch.zeros_like(like))


@pytest.mark.parametrize("needs", [n for n in itertools.product([True, False], repeat=3) if any(n)])
def test_what_nothing_needs_is_none(needs: tuple[bool, bool, bool]) -> None:
    args = whole(make_call(S=20))
    o, lse = merged(args)
    do = weight(o)
    want = epilogue.bwd(args, o, lse, do, torch.zeros_like(args.q), ALL)
    got = epilogue.bwd(args, o, lse, do, None, Needs(needs[0], False, False, *needs[1:]))
    for need, x, y in zip(needs, got, want, strict=True):
        assert (x is not None) == need
        assert x is None or (y is not None and torch.equal(x, y))


def test_the_prefix_keeps_its_own_dtype() -> None:
    call = make_call(S=20, dtype=torch.float16)
    want = results(call)
    for name in ("prefix_k", "prefix_v"):
        call.leaves[name] = call.leaves[name].detach().float()
    got = results(call)
    assert got["dprefix_k"].dtype == got["dprefix_v"].dtype == torch.float32
    for name, x in got.items():
        torch.testing.assert_close(x.to(want[name].dtype), want[name], rtol=0, atol=0)


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.startswith("bank") and "gate" not in case and "packed" not in case]
)
def test_banks(case: str) -> None:
    call = CASES[case]().to(torch.float32)
    want = {name: x for name, x in truth(call).items() if name in ("o", "lse")}
    args = whole(call)
    lens = args.prefix_lens
    if lens is not None:  # what is behind a prefix's end is never read
        behind = torch.arange(args.num_prefix_tokens) >= lens[:, None]
        for x in (args.prefix_k, args.prefix_v):
            x.masked_fill_(behind[:, None, :, None], float("nan"))
    assert_close(dict(zip(("o", "lse"), merged(args), strict=True)), want, 1e-5)
    assert epilogue.bwd_reasons(args) == ["prefix_ids: one prefix only"]


@pytest.mark.parametrize("case", ["plain", "bank_ragged", "sinks"])
def test_the_share_of_the_prefix(case: str) -> None:
    args = whole(CASES[case]().to(torch.float32))
    prefix_lse = torch.empty(args.q.shape[:3])
    merged(args, prefix_lse)
    alone = dataclasses.replace(args, k=args.k[:, :, :0], v=args.v[:, :, :0], causal=False, sinks=None)
    torch.testing.assert_close(prefix_lse, reference.fwd(alone)[1])


@pytest.mark.parametrize("case", ["plain", "sinks", "left_padding"])
def test_large_scores_stay_finite(case: str) -> None:
    call = CASES[case]().to(torch.float32)
    with torch.no_grad():
        for x in call.leaves.values():
            x.mul_(100.0)
    for name, x in results(call).items():
        assert x.isfinite().all(), name


def test_scores_far_below_zero() -> None:
    """What the last tile holds beyond the prefix has score 0, which is above all others here."""
    call = make_call(S=20)
    with torch.no_grad():
        for name in ("k", "prefix_k"):
            call.leaves[name].sub_(6.0)
        call.leaves["q"].add_(6.0)
    want = truth(call)
    got = results(call)
    assert_close(got, {name: want[name] for name in got}, 1e-4)


def test_sinks_in_rows_that_see_nothing_else() -> None:
    call = CASES["bank_and_padding"]().to(torch.float32)
    call.options["sinks"] = torch.tensor([float("-inf"), -3.4e38, -3e38, -1e38, 0.0, 1.0])
    want = {name: x for name, x in truth(call).items() if name in ("o", "lse")}
    assert want["lse"].isinf().any()
    assert_close(dict(zip(("o", "lse"), merged(whole(call)), strict=True)), want, 1e-5)
