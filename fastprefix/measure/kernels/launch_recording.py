"""Record the kernel launches of a call instead of making them, to see which kernels it would compile."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch


class Launch(NamedTuple):
    """One recorded launch: the Triton kernel, its arguments, its compile-time options and how many programs it has."""

    kernel: Any
    args: tuple[Any, ...]
    options: dict[str, Any]
    programs: int = 1

    @property
    def name(self) -> str:
        """The kernel's name in the tile tables: ``fwd`` for ``_prefix_attn_fwd_kernel``."""
        return str(self.kernel.__name__).removeprefix("_prefix_attn_").removesuffix("_kernel")

    @property
    def fingerprint(self) -> tuple[object, ...]:
        """Equal for two launches that share one compilation by Triton, different for two that do not."""
        plain = (parameter.do_not_specialize for parameter in getattr(self.kernel, "params", ()))
        args = (type(x) if skip else _specialization(x) for x, skip in itertools.zip_longest(self.args, plain))
        return self.name, *args, *sorted(self.options.items())


@contextmanager
def recorded_launches(capability: int, name: str = "", sms: int | None = None) -> Iterator[list[Launch]]:
    """Collect the launches inside the block, as they would be on a device of ``capability`` (90 for sm_90) with ``sms``
    multiprocessors.
    """
    from fastprefix.backends.launch import launcher

    launches: list[Launch] = []

    def record(kernel: Any, grid: int, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        launches.append(Launch(kernel, args, options, grid))

    with launcher.dry_run(record, capability, name, sms):
        yield launches


def _specialization(x: Any) -> object:
    """What Triton compiles for of one argument: a dtype, None, or whether a number is 1 or a multiple of 16."""
    if isinstance(x, torch.Tensor):
        return x.dtype
    if isinstance(x, (tuple, list)):
        return (type(x).__name__, *(_specialization(y) for y in x))
    if hasattr(x, "block_shape"):
        return x.base.dtype, tuple(x.block_shape)
    if isinstance(x, int):
        return x == 1, x % 16 == 0
    return type(x).__name__ if isinstance(x, float) else x
