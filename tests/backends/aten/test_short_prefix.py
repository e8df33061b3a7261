"""How `aten` runs a short prefix: the fused epilogue beside a vendor kernel, and which vendor kernel on CUDA."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastprefix.backends import aten, aten_ops_cuda, aten_routes, concatenated_prefix
from fastprefix.types import AttentionArgs, Needs
from tests.support.operator_calls import Call, arguments, make_call, run
from tests.support.operator_cases import CASES
from tests.support.operator_oracle import assert_close, assert_within_rule, truth

pytest.importorskip("triton")

from fastprefix.backends.launch import epilogue

pytestmark = [pytest.mark.usefixtures("poisoned_memory"), pytest.mark.slow]

ALL = Needs(True, True, True, True, True)


def taken(call: Call) -> AttentionArgs:
    """The call's arguments; skips where the epilogue's kernels cannot take them here."""
    args = arguments(call)
    if epilogue.reasons(args):
        pytest.skip("; ".join(epilogue.reasons(args)))
    return args


class CallsOfTheEpilogue:
    """Counts what `aten` asks of the epilogue."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        for name in ("fwd", "bwd"):
            monkeypatch.setattr(epilogue, name, self._watched(name, getattr(epilogue, name)))
        monkeypatch.setattr(aten_routes, "SHORT_ON", ("cpu",))
        monkeypatch.setattr(concatenated_prefix, "preferred", lambda args: False)

    def _watched(self, name: str, function: Any) -> Any:
        def call(*args: Any) -> Any:
            self.calls.append(name)
            return function(*args)

        return call


@pytest.mark.parametrize(("case", "called"), [
    ("plain", ["fwd", "bwd"]), ("with_a_cache", ["fwd", "bwd"]), ("sinks", ["fwd", "bwd"]), ("mqa", ["fwd", "bwd"]),
    ("left_padding", ["fwd", "bwd"]), ("no_content", []), ("no_prefix", []), ("no_rows", []), ("bank", ["fwd"]),
    ("bank_per_row", ["fwd"]), ("bank_and_padding", ["fwd"]), ("d_v_smaller", []),
])  # fmt: skip
def test_aten_takes_it_for_a_short_prefix(case: str, called: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    call = CASES[case]().to(torch.float32)
    taken(call)
    seen = CallsOfTheEpilogue(monkeypatch)
    assert_close(run(call, "aten"), truth(call), 1e-5)
    assert seen.calls == called


@pytest.mark.parametrize(("P", "called"), [(32, ["fwd", "bwd"]), (33, ["fwd"]), (129, [])])
def test_aten_takes_it_up_to_a_length(P: int, called: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    call = make_call(B=1, S=80, P=P, dtype=torch.float16)
    taken(call)
    seen = CallsOfTheEpilogue(monkeypatch)
    assert_within_rule(run(call, "aten"), call)
    assert seen.calls == called


def test_aten_trains_a_prefix_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    call = make_call(S=20)
    want = truth(call)
    for name in ("q", "k", "v"):
        call.leaves[name].requires_grad_(False)
    taken(call)
    seen = CallsOfTheEpilogue(monkeypatch)
    got = run(call, "aten")
    assert_close(got, {name: want[name] for name in got}, 1e-5)
    assert seen.calls == ["fwd", "bwd"] and "dq" not in got


def test_not_on_a_cpu() -> None:
    args = taken(make_call())
    assert args.q.device.type != "cpu" or aten_routes.guess(args).prefix != "epilogue"


class AttentionOps(TorchDispatchMode):
    """Names of the attention ops that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "attention" in str(func):
            self.names.append(str(func).split(".")[1].removeprefix("_scaled_dot_product_"))
        return func(*args, **(kwargs or {}))


CUDNN, FLASH = "cudnn_attention", "flash_attention"


@pytest.mark.parametrize(
    ("shape", "content"),
    [
        ({"S": 24}, CUDNN),
        ({"S": 24, "D_v": 32}, CUDNN),
        ({"S": 24, "D": 256}, FLASH),
        ({"S": 1, "T": 24}, FLASH),
        ({"S": 24, "scale": 0.0, "causal": False}, FLASH),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_which_vendor_on_cuda(
    shape: dict[str, Any], content: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shapes and argument order of both, on meta tensors: all that can be checked without a device."""
    torch.use_deterministic_algorithms(False)
    monkeypatch.setattr(aten_ops_cuda, "_has_cudnn", lambda: True)
    monkeypatch.setattr(aten_ops_cuda, "prefers_cudnn", lambda device: True)
    monkeypatch.setattr(aten, "_prefix_bwd", lambda args, *rest: (None, args.prefix_k, args.prefix_v, None))
    call = make_call(P=16, dtype=dtype, **{"D": 64, **shape})
    leaves = {n: x.detach().to("meta") for n, x in call.leaves.items()}
    args = AttentionArgs(**leaves, **{"scale": 0.125, **call.options})
    with AttentionOps() as ops:
        o, lse = aten.fwd(args)
        assert o.shape == (*args.q.shape[:3], args.v.shape[3]) and lse.shape == o.shape[:3]
        assert lse.dtype == torch.float32
        grads = aten.bwd(args, o, lse, torch.empty_like(o).contiguous(), ALL)
    for name, grad in zip(leaves, grads, strict=False):
        assert grad is not None and grad.shape == leaves[name].shape, name
    assert ops.names[0] == content and ops.names[-1] == f"{content}_backward"


def test_flash_where_determinism_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aten_ops_cuda, "_has_cudnn", lambda: True)
    monkeypatch.setattr(aten_ops_cuda, "prefers_cudnn", lambda device: True)
    q = torch.empty(1, 2, 8, 64, dtype=torch.float16, device="meta")
    assert not aten_ops_cuda.takes_cudnn(q, q, 0.125)
    torch.use_deterministic_algorithms(False)
    assert aten_ops_cuda.takes_cudnn(q, q, 0.125)
    assert not aten_ops_cuda.takes_cudnn(q, q[:, :, :1], 0.125)
    monkeypatch.setattr(torch.backends.cuda, "cudnn_sdp_enabled", lambda: False)
    assert not aten_ops_cuda.takes_cudnn(q, q, 0.125)
