"""Models that leave fp64: what they compute without leaving it, and the error rule that holds two runs against it.

Many models take their norms, softmaxes or rotary angles to fp32 whatever their own dtype is. How such a step rounds
depends on the processor (vectors of another width, another cosine), so no fixed tolerance fits two of its layouts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

TINY = 1e-6


class StayingInDouble(TorchFunctionMode):
    """Inside the block every conversion to fp32 is one to fp64."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.float:
            return args[0].double()

        def wider(x: Any) -> Any:
            return torch.float64 if x is torch.float32 else x

        return func(*map(wider, args), **{name: wider(x) for name, x in (kwargs or {}).items()})


def assert_model_rule(got: Sequence[Tensor], eager: Sequence[Tensor], truth: Sequence[Tensor]) -> None:
    """CONTRIBUTING's error rule for outputs and gradients of a model: ``err(got) <= 2 * err(eager) + tiny``.

    Args:
        got: ours; eager: concatenation in the model's own dtypes; truth: concatenation under :class:`StayingInDouble`.
            In models that stay in fp64 the last two are equal but for the last bits, and the rule is ``tiny``.
    """
    assert len(got) == len(eager) == len(truth)
    for i, (x, y, z) in enumerate(zip(got, eager, truth, strict=True)):
        assert x.shape == y.shape == z.shape, f"number {i}: shapes {list(x.shape)}, {list(y.shape)}, {list(z.shape)}"
        assert not z.isnan().any()
        mine, theirs = ((w.double() - z.double()).abs().max().item() if w.numel() else 0.0 for w in (x, y))
        floor = TINY * max(1.0, z.abs().max().item() if z.numel() else 1.0)
        assert mine <= 2 * theirs + floor, f"number {i}: error {mine:.3e}, eager's {theirs:.3e}"
