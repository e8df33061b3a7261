"""The operator as torch sees it: opcheck, compile, autocast, what is saved and computed, no second derivative."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastprefix import ops, prefix_attention
from fastprefix.backends import aten_ops, native
from fastprefix.measure.training.saved_bytes import saved_bytes
from tests.support.operator_calls import GENERAL, Call, interpreted, make_call, run
from tests.support.operator_cases import CASES


def raw_inputs(call: Call, backend: str) -> tuple[Any, ...]:
    """The fwd op's positional inputs, as ``prefix_attention`` hands them over."""
    seen: list[tuple[Any, ...]] = []
    original = ops.prefix_attn_fwd
    try:
        ops.prefix_attn_fwd = lambda *a: seen.append(a) or original(*a)  # type: ignore[assignment, func-returns-value]
        run(call, backend)
    finally:
        ops.prefix_attn_fwd = original
    return seen[0]


# Every case on the vendor's ops and on the reference; of Triton's interpreter, which takes seconds for each, a few.
FEW = ("plain", "sinks", "bank", "bank_packed_per_row")


def on_every_backend(*cases: str) -> list[Any]:
    """Parameters ``case, backend``; where kernels are interpreted, all cases but ``FEW`` are marked exhaustive."""
    return [
        pytest.param(case, name, marks=pytest.mark.exhaustive if interpreted(name) and case not in FEW else ())
        for case in cases
        for name in GENERAL
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "backend"),
    on_every_backend(
        "plain",
        "no_prefix",
        "d_v_smaller",
        "left_padding",
        "q_start_scalar",
        "bank",
        "bank_packed",
        "bank_packed_per_row",
        "sinks",
        "bias_trained",
        "with_a_cache",
    ),
)
def test_opcheck(case: str, backend: str) -> None:
    inputs = raw_inputs(CASES[case]().to(torch.float32), backend)
    torch.library.opcheck(torch.ops.fastprefix.prefix_attn_fwd, inputs)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "backend"),
    on_every_backend("plain", "d_v_smaller", "bank", "bank_packed", "bias_trained", "prefix_bias", "sinks"),
)
def test_opcheck_backward(case: str, backend: str) -> None:
    inputs = raw_inputs(CASES[case]().to(torch.float32), backend)
    o, lse = torch.ops.fastprefix.prefix_attn_fwd(*inputs)
    needs = [True] * 5 + [case == name for name in ("bias_trained", "prefix_bias", "sinks")]
    inputs = tuple(x.detach() if isinstance(x, torch.Tensor) else x for x in inputs)
    torch.library.opcheck(
        torch.ops.fastprefix.prefix_attn_bwd,
        (*inputs, o.detach(), lse.detach(), torch.randn_like(o), needs),
        test_utils=("test_schema", "test_faketensor"),
    )


COMPILED = ("plain", "left_padding", "gate", "bank", "bank_packed", "softcap", "q_start_scalar", "window")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "backend"), on_every_backend(*COMPILED, "bank_packed_per_row", "bank_packed_and_each_row_its_gate")
)
def test_compile_fullgraph(case: str, backend: str) -> None:
    torch._dynamo.reset()
    call = CASES[case]().to(torch.float32)
    want = run(call, backend)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def f(**leaves: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return prefix_attention(**leaves, **call.options, return_lse=True, backend=backend)

    o, lse = f(**call.leaves)
    torch.testing.assert_close(o, want["o"])
    torch.testing.assert_close(lse, want["lse"])
    weight = torch.sin(torch.arange(o.numel(), dtype=torch.float64) * 0.7).view(o.shape).float()
    trained = call.trained()
    for name, grad in zip(trained, torch.autograd.grad(o, list(trained.values()), weight), strict=True):
        torch.testing.assert_close(grad, want[f"d{name}"])


@pytest.mark.slow
def test_compile_with_inductor_and_dynamic_shapes(backend: str) -> None:
    torch._dynamo.reset()
    f = torch.compile(lambda *a: prefix_attention(*a, backend=backend) * 2, fullgraph=True, dynamic=True)
    for S in (5, 9):
        call = make_call(S=S)
        torch.testing.assert_close(f(*call.leaves.values()), run(call, backend)["o"] * 2)


def test_autocast_lowers_q_k_v_and_leaves_the_prefix_its_dtype(backend: str) -> None:
    call = make_call()
    call.leaves["v"] = call.leaves["v"].detach().bfloat16().requires_grad_()  # as RoPE leaves it: q, k fp32, v bf16
    run(call.to(torch.bfloat16), backend)  # skips where a backend has no bf16
    with torch.autocast("cpu", torch.bfloat16):
        o = prefix_attention(**call.leaves, backend=backend)
    assert o.dtype == torch.bfloat16
    o.float().sum().backward()
    assert call.leaves["prefix_k"].grad is not None and call.leaves["prefix_k"].grad.dtype == torch.float32


def test_double_backward_is_refused(backend: str) -> None:
    call = make_call()
    o = prefix_attention(**call.leaves, backend=backend)
    (grad,) = torch.autograd.grad(o.square().sum(), call.leaves["q"], create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        grad.sum().backward()


def test_double_backward_through_the_sinks_is_refused(backend: str) -> None:
    call = CASES["sinks"]()
    o = prefix_attention(**call.leaves, **call.options, backend=backend)
    (grad,) = torch.autograd.grad(o.square().sum(), call.options["sinks"], create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        grad.sum().backward()


def test_forward_mode_is_refused(backend: str) -> None:
    leaves = {name: x.detach() for name, x in make_call().leaves.items()}

    def f(prefix_k: torch.Tensor) -> torch.Tensor:
        return prefix_attention(**{**leaves, "prefix_k": prefix_k}, backend=backend)

    with pytest.raises(RuntimeError, match="forward-mode"):
        torch.func.jvp(f, (leaves["prefix_k"],), (torch.ones_like(leaves["prefix_k"]),))


def test_the_output_is_no_view_of_a_function_s_own(backend: str) -> None:
    """Models write into what they reshape; torch forbids that on views which a custom Function returned."""
    o = prefix_attention(**make_call().leaves, backend=backend)
    o.transpose(1, 2).reshape(2, 5, -1).add_(1.0)


def test_lse_carries_no_gradient(backend: str) -> None:
    _, lse = prefix_attention(**make_call().leaves, return_lse=True, backend=backend)
    assert not lse.requires_grad


@pytest.mark.parametrize("trained", [("q",), ("k",), ("prefix_k",), ("prefix_v", "v"), ("prefix_k", "prefix_v"), ()])
def test_only_what_is_needed_is_returned(trained: tuple[str, ...], backend: str) -> None:
    call = make_call()
    want = run(call, backend)
    for name, x in call.leaves.items():
        x.requires_grad_(name in trained)
    got = run(call, backend)
    assert {n for n in got if n.startswith("d")} == {f"d{n}" for n in trained}
    for name, x in got.items():
        torch.testing.assert_close(x, want[name])


def test_the_lowest_layer_launches_one_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the prefix trains: the vendor's backward runs on the prefix part alone."""
    launched: list[int] = []
    original = aten_ops.bwd
    monkeypatch.setattr(aten_ops, "bwd", lambda *a: launched.append(a[2].shape[2]) or original(*a))
    for trained in (("prefix_k", "prefix_v"), ("q", "k", "v", "prefix_k", "prefix_v")):
        call = make_call(S=5, P=7)
        for name, x in call.leaves.items():
            x.requires_grad_(name in trained)
        prefix_attention(**call.leaves, backend="aten").sum().backward()
    assert launched == [7, 5, 7]


def test_saved_bytes_do_not_hold_a_copy_of_the_prefix(backend: str) -> None:
    saved: dict[int, int] = {}
    for P in (0, 64):
        call = make_call(B=4, S=8, P=P)
        seen: dict[int, int] = {}

        def pack(x: torch.Tensor, seen: dict[int, int] = seen) -> torch.Tensor:
            seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            prefix_attention(**call.leaves, backend=backend)
        params = {call.leaves[n].untyped_storage().data_ptr() for n in ("prefix_k", "prefix_v")}
        saved[P] = sum(n for ptr, n in seen.items() if ptr not in params)
    assert saved[64] == saved[0] > 0


def test_saved_bytes_do_not_grow_with_padding(backend: str) -> None:
    """A packed bank saves nothing but ids and lengths, however unequal these are."""
    saved = {}
    for name, lens in (("equal", [20] * 8), ("unequal", [4] * 7 + [132]), ("none", [0] * 8)):
        call = make_call(B=8, S=8, packed=lens, prefix_ids=torch.arange(8))
        saved[name] = saved_bytes(
            lambda call=call: prefix_attention(**call.leaves, **call.options, backend=backend),
            exclude=[call.leaves["prefix_k"], call.leaves["prefix_v"]],
        )
    assert saved["unequal"] == saved["equal"] == saved["none"] > 0


class TestWithoutTheOperator:
    """Without gradients the backend is called at once, unless the operator would be seen."""

    def seen(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        calls: list[str] = []
        forward = ops.forward

        def noted(*args: Any) -> Any:
            calls.append("direct")
            return forward(*args)

        monkeypatch.setattr(ops, "forward", noted)
        monkeypatch.setattr(native, "attend", None)  # it needs neither; see tests/native/test_direct.py
        return calls

    def test_a_plain_call(self, monkeypatch: pytest.MonkeyPatch) -> None:
        calls, call = self.seen(monkeypatch), make_call()
        with torch.no_grad():
            direct = prefix_attention(**call.leaves)
        assert calls == ["direct"]
        trained = prefix_attention(**call.leaves)
        assert calls == ["direct"] and torch.equal(direct, trained)
        assert direct.stride() == trained.stride() and not direct._is_view()
        direct.add_(1.0)

    def test_whoever_looks_sees_the_operator(self, monkeypatch: pytest.MonkeyPatch) -> None:
        calls = self.seen(monkeypatch)
        leaves = {name: x.detach() for name, x in make_call().leaves.items()}
        mask = torch.ones(2, 5, dtype=torch.bool)

        class Mine(torch.Tensor):
            pass

        class Watching(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                return func(*args, **(kwargs or {}))

        with Watching():
            prefix_attention(**leaves)
        with torch.device("cpu"):
            prefix_attention(**leaves)
        prefix_attention(**{**leaves, "q": leaves["q"].as_subclass(Mine)})
        prefix_attention(**leaves, key_padding_mask=mask.as_subclass(Mine))
        torch.func.vmap(lambda q: prefix_attention(**{**leaves, "q": q}))(leaves["q"][None])
        torch._dynamo.reset()  # after many compilations of a function it is no longer compiled
        torch.compile(prefix_attention, backend="eager", fullgraph=True)(**leaves)
        with torch.autograd.forward_ad.dual_level():
            prefix_attention(**leaves)
        meta = {name: x.to("meta") for name, x in leaves.items()}
        assert prefix_attention(**meta, backend="aten").shape == leaves["q"].shape
        assert not calls

    @pytest.mark.parametrize("grad", [False, True])
    def test_autocast_reaches_no_backend(self, grad: bool) -> None:
        """It is applied to the inputs; the reference's own products stay fp32, and so does lse."""
        call = make_call(S=40, P=16, D=64)
        half = {name: x.detach().bfloat16().requires_grad_(grad) for name, x in call.leaves.items()}
        want = prefix_attention(**half, softcap=3.0, backend="reference", return_lse=True)
        with torch.autocast("cpu", torch.bfloat16):
            got = prefix_attention(**half, softcap=3.0, backend="reference", return_lse=True)
            assert got[1].dtype == torch.float32 and torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
            if grad:
                grads = (torch.autograd.grad(o.float().sum(), list(half.values())) for o in (got[0], want[0]))
                assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
