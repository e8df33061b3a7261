"""Random calls of the operator, with what they compute: outputs and the gradient of every trained input."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from fastprefix import prefix_attention
from fastprefix.dispatch import UnsupportedError, has_every_gradient, module
from fastprefix.types import BACKENDS, AttentionArgs, BackendName

# Backends that take calls of every kind, with gradients; one that only decodes has tests of its own.
GENERAL: tuple[BackendName, ...] = tuple(name for name in BACKENDS if has_every_gradient(name))


@dataclass
class Call:
    """Leaves and options of one ``prefix_attention`` call."""

    leaves: dict[str, Tensor]
    options: dict[str, Any] = field(default_factory=dict)

    def to(self, dtype: torch.dtype) -> Call:
        """The same numbers in another dtype, as new leaves."""

        def cast(x: Any) -> Any:
            if isinstance(x, Tensor) and x.is_floating_point():
                return x.detach().to(dtype).requires_grad_(x.requires_grad)
            return x

        return Call({n: cast(x) for n, x in self.leaves.items()}, {n: cast(x) for n, x in self.options.items()})

    def trained(self) -> dict[str, Tensor]:
        """Every leaf and option that requires a gradient."""
        return {n: x for n, x in {**self.leaves, **self.options}.items() if isinstance(x, Tensor) and x.requires_grad}


def make_call(
    B: int = 2,
    H: int = 6,
    H_kv: int = 2,
    S: int = 5,
    T: int | None = None,
    P: int = 7,
    D: int = 16,
    D_v: int | None = None,
    N: int | None = None,
    packed: Sequence[int] | None = None,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Call:
    """Random leaves in [B, S, H, D] storage, as models have them; ``N`` or ``packed`` lengths make a bank."""
    T, D_v = S if T is None else T, D_v or D
    if packed is not None:
        P, options["prefix_lens"] = sum(packed), torch.tensor(packed)

    def bshd(heads: int, length: int, dim: int) -> Tensor:
        return torch.randn(B, length, heads, dim, dtype=torch.float64).transpose(1, 2)

    lead = () if N is None else (N,)
    values = {
        "q": bshd(H, S, D),
        "k": bshd(H_kv, T, D),
        "v": bshd(H_kv, T, D_v),
        "prefix_k": torch.randn(*lead, H_kv, P, D, dtype=torch.float64),
        "prefix_v": torch.randn(*lead, H_kv, P, D_v, dtype=torch.float64),
    }
    return Call({n: x.to(dtype).requires_grad_() for n, x in values.items()}, options)


def arguments(call: Call) -> AttentionArgs:
    """The call as a backend sees it, without gradients."""
    leaves = {name: x.detach() for name, x in call.leaves.items()}
    options = {name: x.detach() if isinstance(x, Tensor) else x for name, x in call.options.items()}
    scale = options.pop("scale", None)
    return AttentionArgs(**leaves, scale=leaves["q"].shape[3] ** -0.5 if scale is None else scale, **options)


def interpreted(backend: str) -> bool:
    """Whether a backend's kernels run in Triton's interpreter, which takes some 12 ms for each program."""
    return backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1"


def backend_params(names: Iterable[str]) -> list[Any]:
    """Parameters of a test; what is interpreted is marked slow."""
    return [pytest.param(name, marks=pytest.mark.slow if interpreted(name) else ()) for name in names]


def backends_of(dtype: torch.dtype) -> list[str]:
    """The general backends that compute in a dtype here; a test that is of one dtype is made for these alone."""
    args = arguments(make_call(dtype=dtype))
    return [name for name in GENERAL if not module(name).unsupported(args)]


def run(call: Call, backend: str) -> dict[str, Tensor]:
    """o, lse and the gradient of every trained input, for a fixed output gradient; skips with a backend's reasons."""
    try:
        o, lse = prefix_attention(**call.leaves, **call.options, return_lse=True, backend=backend)
    except UnsupportedError as error:
        pytest.skip(str(error))
    return {"o": o.detach(), "lse": lse, **gradients(o, call)}


def gradients(o: Tensor, call: Call) -> dict[str, Tensor]:
    """Gradients named d<input>."""
    trained = call.trained()
    if not o.requires_grad:
        return {f"d{name}": torch.zeros_like(x) for name, x in trained.items()}
    weight = torch.sin(torch.arange(o.numel(), dtype=torch.float64) * 0.7).view(o.shape).to(o.dtype)
    grads = torch.autograd.grad(o, list(trained.values()), weight, materialize_grads=True)
    return {f"d{name}": grad for name, grad in zip(trained, grads, strict=True)}
