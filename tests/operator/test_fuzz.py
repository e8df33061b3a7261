"""Any call of the operator: right by the fp64 reference, or an error that names the argument; never NaN."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastprefix import prefix_attention
from fastprefix.dispatch import UnsupportedError
from tests.support.operator_calls import Call, make_call, run
from tests.support.operator_oracle import assert_close, brute_force

QUICK = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    database=None,
    derandomize=True,
    phases=[Phase.generate],
)
FULL = settings(QUICK, max_examples=1500, derandomize=False)

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
small = st.integers(1, 4)


def values(draw: st.DrawFn, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Numbers, now and then large ones or all alike."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    return (x * draw(st.sampled_from([0.0, 1.0, 1.0, 1.0, 30.0]))).to(dtype)


@st.composite
def valid(draw: st.DrawFn) -> Call:
    """A call that the operator documents."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    B, H_kv, G = draw(st.integers(0, 3) | small), draw(small), draw(small)
    S, T, P = draw(st.integers(0, 6)), draw(st.integers(0, 7)), draw(st.integers(0, 5))
    shape: dict[str, Any] = {"B": B, "H": H_kv * G, "H_kv": H_kv, "S": S, "T": T, "P": P}
    shape["D"], shape["D_v"] = draw(st.sampled_from([1, 3, 8, 16])), draw(st.sampled_from([1, 4, 8, 16]))
    options: dict[str, Any] = {"causal": draw(st.booleans())}

    def maybe(name: str, make: Any, chance: int = 3) -> None:
        if draw(st.integers(0, chance)) == 0:
            options[name] = make()

    def ints(low: int, high: int, *sizes: int) -> Tensor:
        count = 1
        for size in sizes:
            count *= size
        found = draw(st.lists(st.integers(low, high), min_size=count, max_size=count))
        return torch.tensor(found, dtype=draw(st.sampled_from([torch.int64, torch.int32]))).reshape(sizes)

    maybe("scale", lambda: draw(st.sampled_from([0.0, -0.5, 1.0, 3.0])))
    maybe("key_padding_mask", lambda: ints(0, 1, B, T).bool())
    maybe("segment_ids", lambda: ints(-1, 2, B, T))
    maybe(
        "q_start",
        lambda: (
            draw(st.integers(-3, T + 3)) if draw(st.booleans()) else ints(-2, T + 2, *([B][: draw(st.integers(0, 1))]))
        ),
    )
    if options["causal"]:
        maybe("window", lambda: draw(st.integers(1, 9)))
    maybe("softcap", lambda: draw(st.sampled_from([0.5, 5.0, 50.0])))
    H = H_kv * G
    maybe("sinks", lambda: values(draw, H).requires_grad_(draw(st.booleans())))
    sizes = [draw(st.sampled_from([1, n])) for n in (B, H, S, T)]
    first = draw(st.integers(0, 4))
    maybe(
        "bias",
        lambda: draw(
            st.sampled_from([lambda: values(draw, *sizes[first:]), lambda: ints(0, 1, *sizes[first:]).bool()])
        )(),
    )
    maybe("gate", lambda: values(draw, H))
    bank = draw(st.sampled_from(["none", "none", "padded", "ragged", "packed"]))
    if bank != "none":
        N = draw(small)
        rows = [B, S] if draw(st.booleans()) else [B]
        options["prefix_ids"] = ints(-1, N - 1, *rows)
        if bank == "ragged":
            options["prefix_lens"] = ints(0, P, N)
        if bank == "packed":
            shape["packed"] = draw(st.lists(st.integers(0, 4), min_size=N, max_size=N))
        else:
            shape["N"] = N
    dtype = draw(st.sampled_from(list(TOLERANCE)))
    call = make_call(**shape, **options)
    if draw(st.integers(0, 3)) == 0:
        bias = values(draw, *call.leaves["prefix_k"].shape[:-1])
        bias[bias > draw(st.sampled_from([0.5, 1e9]))] = float("-inf")
        call.options["prefix_bias"] = bias.requires_grad_(draw(st.booleans()))
    loud = draw(st.sampled_from([0.0, 1.0, 1.0, 1.0, 20.0]))
    call = Call(
        {n: (x.detach() * loud).requires_grad_(draw(st.integers(0, 3)) > 0) for n, x in call.leaves.items()},
        call.options,
    )
    return call.to(dtype)


def finite(call: Call, backend: str) -> None:
    """Numbers everywhere, and -inf as the lse of rows that see nothing only."""
    try:
        o, lse = prefix_attention(**call.leaves, **call.options, return_lse=True, backend=backend)
    except UnsupportedError:
        return
    assert o.isfinite().all() and not lse.isnan().any() and not (lse == float("inf")).any()
    assert not o[lse == float("-inf")].any() or "gate" in call.options
    trained = list(call.trained().values())
    if o.requires_grad:
        for grad in torch.autograd.grad(o, trained, torch.ones_like(o), allow_unused=True):
            assert grad is None or grad.isfinite().all()


def right(call: Call, backend: str) -> None:
    """Finite, and what loops over rows give in fp64."""
    finite(call, backend)
    if any(x.numel() and x.abs().max() > 8 for x in call.leaves.values()):
        return  # a softmax of one key, whose gradients are differences of large numbers: finite is all there is to say
    try:
        got = run(call, backend)
    except pytest.skip.Exception:
        return
    assert_close(got, brute_force(call.to(torch.float64)), TOLERANCE[call.leaves["q"].dtype])


# In place of an argument: what is none, is of another shape, dtype or device, or out of range.
WRONG: list[Any] = [
    None, 0, 1, -1, 3, 2.5, float("nan"), float("inf"), True, False, "x", [], (1, 2), {}, 10**30, object(),
    torch.tensor(1), torch.tensor(-7), torch.tensor([1.0]), torch.zeros(0), torch.zeros(2, 0, 3, 4), torch.ones(2, 5),
    torch.ones(2, 5, dtype=torch.bool), torch.full((2,), 9), torch.full((2,), -9), torch.full((3,), 2**40),
    torch.zeros(2, 6, 5, 16, dtype=torch.complex64), torch.zeros(2, 6, 5, 16, dtype=torch.float8_e4m3fn),
    torch.zeros(2, 2, 5, 16, device="meta"), torch.zeros(2, 2, 5, 16).to_sparse(), torch.randn(2, 7, 16),
    torch.randn(3, 2, 7, 16), torch.randn(2, 6, 5, 16).half(), torch.randn(2, 2, 5, 16).bfloat16(),
    torch.zeros(2, 2, 5, 16, dtype=torch.int64),
]  # fmt: skip
NAMES = (
    "q", "k", "v", "prefix_k", "prefix_v", "causal", "scale", "key_padding_mask", "segment_ids", "q_start", "window",
    "softcap", "sinks", "bias", "gate", "prefix_ids", "prefix_lens", "prefix_bias", "dropout_p", "return_lse",
    "backend",
)  # fmt: skip
ARGUMENT = re.compile(rf"^({'|'.join(NAMES)}): got .+, expected .+|^backend '\w+' cannot take", re.DOTALL)


@st.composite
def wrong(draw: st.DrawFn) -> dict[str, Any]:
    """A call with some arguments replaced by anything, or of random shapes."""
    arguments: dict[str, Any] = {**make_call().leaves}
    for name in draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=3, unique=True)):
        if draw(st.booleans()):
            arguments[name] = draw(st.sampled_from(WRONG))
        else:
            sizes = draw(st.lists(st.sampled_from([0, 1, 2, 5, 6, 7, 16]), max_size=5))
            dtypes = [torch.float32, torch.float16, torch.int64, torch.int32, torch.bool, torch.float64]
            arguments[name] = torch.ones(sizes, dtype=draw(st.sampled_from(dtypes)))
    return arguments


def refused_or_finite(arguments: dict[str, Any], backend: str) -> None:
    """A ValueError in the one form of every complaint, or a result without NaN."""
    arguments = {"backend": backend, **arguments}
    try:
        found = prefix_attention(**arguments)
    except ValueError as error:
        assert ARGUMENT.match(str(error)), str(error)
        return
    o = found[0] if isinstance(found, tuple) else found
    assert not o.isnan().any()


def sweep(profile: settings, drawn: Any, check: Any, backends: tuple[str, ...]) -> None:
    @profile
    @given(call=drawn, backend=st.sampled_from(backends))
    def every(call: Any, backend: str) -> None:
        check(call, backend)

    every()


FAST = ("auto", "reference", "aten")
SWEEPS = {
    "valid": (valid(), right, FAST, 1),
    "wrong": (wrong(), refused_or_finite, FAST, 2),
    "valid, interpreted": (valid(), right, ("triton",), 0.1),
}


@pytest.mark.parametrize("what", SWEEPS)
def test_any_call(what: str) -> None:
    drawn, check, backends, share = SWEEPS[what]
    sweep(settings(QUICK, max_examples=int(QUICK.max_examples * share)), drawn, check, backends)


@pytest.mark.exhaustive
@pytest.mark.parametrize("what", SWEEPS)
def test_any_call_in_thousands(what: str) -> None:
    drawn, check, backends, share = SWEEPS[what]
    sweep(settings(FULL, max_examples=int(FULL.max_examples * share)), drawn, check, backends)
