"""Which backend runs, said aloud: by name or not at all, ``auto`` by order, reasons in words."""

from __future__ import annotations

import pytest
import torch

from fastprefix import dispatch, explain, prefix_attention
from fastprefix.backends import aten, cuda, native
from fastprefix.types import AttentionArgs, Needs
from tests.support.operator_calls import arguments, make_call


def test_a_name_never_falls_back() -> None:
    with pytest.raises(dispatch.UnsupportedError, match="softcap: no vendor op caps scores"):
        prefix_attention(**make_call().leaves, softcap=2.0, backend="aten")


def test_auto_finds_one_that_can() -> None:
    call = make_call()
    o = prefix_attention(**call.leaves, softcap=2.0)
    torch.testing.assert_close(o, prefix_attention(**call.leaves, softcap=2.0, backend="reference"))


def test_explain_says_who_and_why_not() -> None:
    lines = dict(line.split(maxsplit=1) for line in explain(**make_call().leaves).splitlines())
    unproved = "not proved: FASTPREFIX_VERIFY=off"
    last = {"aten": f"chosen by auto: {unproved}", "triton": f"can, by name only: {unproved}"}
    last["cuda"] = "cannot: " + "; ".join(cuda.unsupported(arguments(make_call())))
    assert lines == {
        "reference": "can, but auto prefers native",
        "native": f"chosen by auto: {unproved}",
        **last,
        "aten": f"can, but auto prefers native: {unproved}",
    } or lines == {
        "reference": "can, but auto prefers aten",
        "native": f"cannot: {native.ABSENCE}",
        **last,
    }
    lines = dict(line.split(maxsplit=1) for line in explain(**make_call().leaves, dropout_p=0.1).splitlines())
    assert lines["reference"] == "chosen by auto" and lines["aten"].startswith("cannot: dropout_p")


def test_explain_takes_the_arguments_of_the_operator_and_no_others() -> None:
    call = make_call()
    given = prefix_attention.__kwdefaults__ or {}
    assert explain(**call.leaves, **given) == explain(**call.leaves)
    assert explain(**call.leaves, window=2)  # raises without causal, which is on by default
    with pytest.raises(TypeError, match=r"explain: unknown arguments \['scael'\]"):
        explain(**call.leaves, scael=1.0)
    with pytest.raises(ValueError, match="backend: got 'tritn'"):
        explain(**call.leaves, backend="tritn")


def test_the_environment_overrules_auto_only(monkeypatch: pytest.MonkeyPatch) -> None:
    call = make_call()
    monkeypatch.setenv("FASTPREFIX_BACKEND", "aten")
    with pytest.raises(dispatch.UnsupportedError):
        prefix_attention(**call.leaves, softcap=2.0)
    prefix_attention(**call.leaves, softcap=2.0, backend="reference")
    monkeypatch.setenv("FASTPREFIX_BACKEND", "nonsense")
    with pytest.raises(ValueError, match="backend: got 'nonsense'"):
        prefix_attention(**call.leaves)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_cuda_calls_match_their_schemas(dtype: torch.dtype) -> None:
    """Shapes and argument order of the CUDA route, on meta tensors: all that can be checked without a device."""
    call = make_call(S=8, T=24, D=64, P=16, dtype=dtype)
    leaves = {n: x.detach().to("meta") for n, x in call.leaves.items()}
    args = AttentionArgs(**leaves, scale=0.125)
    o, lse = aten.fwd(args)
    assert o.shape == leaves["q"].shape and lse.shape == o.shape[:3] and lse.dtype == torch.float32
    grads = aten.bwd(args, o, lse, torch.empty_like(o), Needs(True, True, True, True, True))
    for name, grad in zip(leaves, grads, strict=False):
        assert grad is not None and grad.shape == leaves[name].shape, name
