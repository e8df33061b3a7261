"""Gradients of the backend ``cuda`` as users get them: through torch's autograd, with the kernels in the emulator."""

from __future__ import annotations

import pytest
import torch

from fastprefix import prefix_attention
from fastprefix.dispatch import UnsupportedError
from tests.cuda.emulated.operators import SM80, emulated
from tests.support.operator_calls import make_call, run
from tests.support.operator_cases import CASES, prefix_bias
from tests.support.operator_oracle import assert_close, assert_within_rule, eager, truth

pytestmark = pytest.mark.slow
# A bias and dropout are refused at the forward, and so is a gate's second softmax with either.
TAKEN = [name for name, make in CASES.items() if not {"bias", "dropout_p"} & make().options.keys()]


# Where a row sees nothing, or there are two softmaxes, the rule has no peer in the same dtype.
TOLERANCE = {torch.bfloat16: 4e-2, torch.float16: 5e-3}


@pytest.mark.parametrize("route", ["fused", SM80])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case", TAKEN)
def test_every_argument(case: str, dtype: torch.dtype, route: str, poisoned_memory: None) -> None:
    call = CASES[case]().to(dtype)
    if dtype == torch.float16 and "sinks" in call.options:
        call.options["sinks"] = call.options["sinks"].float()  # some are as low as no fp16 number is
    with emulated(route) as here:
        got = run(call, "cuda")
        assert not here.session.errors, here.session.errors
    assert_close(got, truth(call), TOLERANCE[dtype])
    if (
        "gate" not in call.options
        and call.leaves["prefix_k"].numel()
        and all(x.isfinite().all() for x in eager(call).values())
    ):
        assert_within_rule(got, call)


def test_only_what_is_trained() -> None:
    """In the lowest layer of a frozen model nothing but the prefix is; its fp32 parameters get fp32 gradients."""
    call = make_call(S=20, D=64, dtype=torch.bfloat16)
    leaves = {name: x.detach() for name, x in call.leaves.items()}
    trained = {name: leaves[name].float().requires_grad_() for name in ("prefix_k", "prefix_v")}
    with emulated("fused") as here:
        o = prefix_attention(**{**leaves, **trained}, backend="cuda")
        found = torch.autograd.grad(o.float().sum(), list(trained.values()))
        assert not here.session.errors, here.session.errors
    want = prefix_attention(**{**leaves, **trained}, backend="reference")
    for x, y in zip(found, torch.autograd.grad(want.float().sum(), list(trained.values()))):
        assert x.dtype == torch.float32
        torch.testing.assert_close(x, y, rtol=2e-2, atol=2e-2 * y.abs().max().item())


@pytest.mark.parametrize("route", ["fused", SM80])
@pytest.mark.parametrize("P", [7, 40, 150])
def test_nothing_but_a_bias_is_trained(P: int, route: str) -> None:
    call = make_call(S=20, D=64, P=P, dtype=torch.bfloat16, softcap=3.0, prefix_bias=prefix_bias(2, P, hidden=2))
    call.leaves = {name: x.detach() for name, x in call.leaves.items()}
    with emulated(route) as here:
        got = run(call, "cuda")
        assert not here.session.errors, here.session.errors
    assert got.keys() == {"o", "lse", "dprefix_bias"} and got["dprefix_bias"].dtype == torch.float32
    assert_within_rule(got, call)


def test_wide_heads_have_none() -> None:
    with emulated("split_kv"), pytest.raises(UnsupportedError, match=r"gradients: q: head dim 256, .* up to 128"):
        prefix_attention(**make_call(D=256, dtype=torch.bfloat16).leaves, backend="cuda")


def test_documents_whose_ids_differ_in_their_high_bits() -> None:
    ids = torch.tensor([[0] * 4 + [2**32] * 3 + [2**40] * 2, [7] * 9])
    call = make_call(S=9, segment_ids=ids, dtype=torch.bfloat16)
    with emulated("fused") as here:
        got = run(call, "cuda")
        assert not here.session.errors, here.session.errors
    assert_within_rule(got, call)
