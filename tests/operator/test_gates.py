"""A gate's second softmax keeps nothing for each sample, and refuses what one softmax refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastprefix import prefix_attention
from fastprefix.functional import add_gated
from fastprefix.measure.training.saved_bytes import SavedBytes
from tests.support.operator_calls import make_call, run


@pytest.mark.parametrize("shape", [(6,), (4, 6)])
@pytest.mark.parametrize("P", [3, 64])
def test_as_many_bytes_are_saved_as_without_a_gate(shape: tuple[int, ...], P: int, backend: str) -> None:
    saved = []
    for gate in (None, torch.randn(shape).requires_grad_()):
        call = make_call(B=4, S=8, P=P)
        shared = [call.leaves["prefix_k"], call.leaves["prefix_v"], *(() if gate is None else (gate,))]
        with SavedBytes(exclude=shared) as found:
            o = prefix_attention(**call.leaves, gate=gate, backend=backend)
        saved.append((found.total, found.count))
        assert o.requires_grad
    assert saved[0] == saved[1]


def test_where_only_the_prefix_trains_no_output_is_saved(backend: str) -> None:
    call = make_call(B=4, S=8)
    for name in "qkv":
        call.leaves[name].requires_grad_(False)
    gate = torch.randn(6).requires_grad_()
    with SavedBytes(exclude=[call.leaves["prefix_k"], call.leaves["prefix_v"], gate]) as found:
        o = prefix_attention(**call.leaves, gate=gate, backend=backend)
    assert found.total == call.leaves["q"].untyped_storage().nbytes()  # which the backward pass reads again
    assert o.requires_grad


class Concatenations(TorchDispatchMode):
    """Counts calls of torch.cat."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten.cat.default
        return func(*args, **(kwargs or {}))


def test_nothing_is_concatenated() -> None:
    call = make_call(gate=torch.randn(6).requires_grad_())
    with Concatenations() as found:
        prefix_attention(**call.leaves, **call.options).sum().backward()
        assert not found.count
        torch.cat([call.leaves["q"], call.leaves["q"]])
    assert found.count == 1


@pytest.mark.parametrize("trained", ["q", "prefix_k"])
def test_double_backward_is_refused(trained: str, backend: str) -> None:
    call = make_call(gate=torch.randn(6).requires_grad_())
    o = prefix_attention(**call.leaves, **call.options, backend=backend)
    (grad,) = torch.autograd.grad(o.square().sum(), call.trained()[trained], create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        grad.square().sum().backward()


def test_gradients_under_vmap_are_those_of_each_call() -> None:
    call = make_call(gate=torch.randn(6)).to(torch.float64)
    leaves, gates = {name: x.detach() for name, x in call.leaves.items()}, torch.randn(3, 6, dtype=torch.float64)

    def loss(gate: torch.Tensor) -> torch.Tensor:
        return prefix_attention(**leaves, gate=gate).square().sum()

    together = torch.vmap(torch.func.grad(loss))(gates)
    for got, gate in zip(together, gates, strict=True):
        want = gate.clone().requires_grad_()
        torch.testing.assert_close(got, torch.autograd.grad(loss(want), want)[0])


def test_a_gate_beside_an_attention_of_its_own_is_the_same(backend: str) -> None:
    """What layers add whose content keeps its own attention equals the call with both."""
    call = make_call(gate=torch.randn(6).requires_grad_())
    want = run(call, backend)
    q, k, v, prefix_k, prefix_v = call.leaves.values()
    nothing = prefix_k[:, :0], prefix_v[:, :0]
    o = add_gated(prefix_attention(q, k, v, *nothing), q, prefix_k, prefix_v, call.options["gate"])
    torch.testing.assert_close(o, want["o"])
    trained = call.trained()
    weight = torch.sin(torch.arange(o.numel(), dtype=torch.float64) * 0.7).view(o.shape).float()
    for name, grad in zip(trained, torch.autograd.grad(o, list(trained.values()), weight), strict=True):
        torch.testing.assert_close(grad, want[f"d{name}"])
