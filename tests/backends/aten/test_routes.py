"""Each route of `aten` by itself: right on every call that it takes, and the vendor kernels that its name says."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastprefix.backends import aten, aten_ops_cuda, aten_routes, triton
from fastprefix.backends.launch import launcher
from fastprefix.machine import device
from fastprefix.types import AttentionArgs, Needs
from tests.backends.aten.test_short_prefix import CUDNN, FLASH, AttentionOps
from tests.support.operator_calls import arguments, make_call
from tests.support.operator_cases import CASES
from tests.support.operator_oracle import assert_close, truth

NAMES = ("q", "k", "v", "prefix_k", "prefix_v")
ALL = Needs(True, True, True, True, True)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("route", aten.routes("cpu"))
@pytest.mark.parametrize("case", [name for name in CASES if "gate" not in name])
def test_every_route_is_right(case: str, route: str) -> None:
    call = CASES[case]().to(torch.float64)
    args = arguments(call)
    if reasons := aten.unsupported(args, route):
        assert all(":" in reason for reason in reasons)
        pytest.skip("; ".join(reasons))
    o, lse = aten.fwd(args, route)
    weight = torch.sin(torch.arange(o.numel(), dtype=torch.float64) * 0.7).view(o.shape)
    grads = aten.bwd(args, o, lse, weight, ALL, route)
    want = truth(call)
    got = {"o": o, "lse": lse, **{f"d{name}": x for name, x in zip(NAMES, grads, strict=False) if x is not None}}
    assert_close(got, {name: want[name] for name in got}, 1e-10)


@pytest.mark.parametrize("case", ["plain", "bank", "mqa", "no_content", "batch_of_one", "with_a_cache", "long_rows"])
def test_the_guess_is_a_route_that_takes_the_call(case: str) -> None:
    args = arguments(CASES[case]())
    assert not aten.unsupported(args, aten.guess(args)) or args.groups == 1


@pytest.mark.parametrize("prefix", ["folded", "packed"])
@pytest.mark.parametrize(("vendor", "op"), [("flash", FLASH), ("cudnn", CUDNN)])
def test_the_vendor_of_a_route_on_cuda(vendor: str, op: str, prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On meta tensors, which is all that can be seen of it without a device."""
    monkeypatch.setattr(aten_ops_cuda, "_has_cudnn", lambda: True)
    monkeypatch.setitem(aten_routes.ROUTES, "meta", aten_routes.ROUTES["cuda"])
    call = make_call(S=24, D=64, P=16, dtype=torch.bfloat16)
    args = AttentionArgs(**{n: x.detach().to("meta") for n, x in call.leaves.items()}, scale=0.125)
    with AttentionOps() as ops:
        o, lse = aten.fwd(args, f"{vendor}-{prefix}")
        aten.bwd(args, o, lse, torch.empty_like(o), ALL, f"{vendor}-{prefix}")
    assert set(ops.names) == {op, f"{op}_backward"}
    assert len(ops.names) == 4  # content and prefix, forward and backward


def test_cudnn_is_no_route_where_it_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(aten_routes.ROUTES, "meta", aten_routes.ROUTES["cuda"])
    monkeypatch.setattr(aten_ops_cuda, "_has_cudnn", lambda: True)

    def reasons(**changes: Any) -> list[str]:
        call = make_call(**{"S": 24, "D": 64, "P": 16, "dtype": torch.bfloat16, **changes})
        args = AttentionArgs(**{n: x.detach().to("meta") for n, x in call.leaves.items()}, scale=0.125)
        return aten_routes.reasons(args, "cudnn-folded")

    assert reasons() == []
    assert "head dims" in reasons(D=256)[0] and "fp16 and bf16" in reasons(dtype=torch.float32)[0]
    torch.use_deterministic_algorithms(True)
    try:
        assert "not deterministic" in reasons()[0]
    finally:
        torch.use_deterministic_algorithms(False)
    monkeypatch.setattr(aten_ops_cuda, "_has_cudnn", lambda: False)
    assert "not in this build" in reasons()[0]


def test_a_bank_is_not_cut_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host would read which rows share a prefix; no capture allows that."""
    given = {"B": 4, "D": 64, "dtype": torch.bfloat16}
    bank = arguments(make_call(**given, N=2, prefix_ids=torch.tensor([0, 1, 1, -1])))
    plain = arguments(make_call(**given))
    assert not aten._reasons_on_cuda(bank)
    monkeypatch.setattr(aten, "is_capturing", lambda place: True)
    assert aten._reasons_on_cuda(bank)[0].startswith("prefix_ids: ") and not aten._reasons_on_cuda(plain)


@pytest.mark.slow
def test_triton_is_not_refused_by_a_vendors_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """AMD's and Intel's GPUs have no compute capability: they get the plainest tiles, and prove themselves."""
    monkeypatch.setattr(device, "GPUS", ("meta",))
    monkeypatch.setattr(triton, "GPUS", ("meta",))
    monkeypatch.setattr(device, "name", lambda place: "AMD Instinct MI300X")
    monkeypatch.setattr(launcher, "INTERPRETER", False)
    args = arguments(make_call(S=24, D=64, dtype=torch.bfloat16))
    there = AttentionArgs(**{n: getattr(args, n).to("meta") for n in NAMES}, scale=0.125)
    assert triton.unsupported(there) == [] and launcher.device(there.q) == (80, "AMD Instinct MI300X")
    monkeypatch.setattr(device, "compute_capability", lambda place: 75)
    assert triton.unsupported(there) == ["device: compute capability 7.5, the kernels need 8.0"]
