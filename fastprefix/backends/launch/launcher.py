"""The one place that launches a kernel, and what it knows of the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from triton.runtime.interpreter import InterpretedFunction

from ..._triton.primitives import dot
from ...machine import device as machine
from .tile_config import SAFE, Tile

Launch = Callable[[Any, int, tuple[Any, ...], dict[str, Any]], object]

# While a dry run lasts: what receives each launch (kernel, grid, arguments, options) instead of the device, and the
# device that is assumed.
_receiver: Launch | None = None
_assumed: tuple[int, str] | None = None
_assumed_sms: int | None = None

# Whether Triton's interpreter runs the kernels, on the CPU.
LEAST = int(SAFE.removeprefix("sm_"))

INTERPRETER = isinstance(dot, InterpretedFunction)


@contextmanager
def dry_run(receiver: Launch, capability: int, name: str = "", sms: int | None = None) -> Iterator[None]:
    """Launch nothing: hand every launch to ``receiver``, as on a device of ``capability`` (90 for sm_90).

    With ``sms`` the device has so many streaming multiprocessors, else those of the tensors' device.
    """
    global _receiver, _assumed, _assumed_sms
    before = _receiver, _assumed, _assumed_sms
    _receiver, _assumed, _assumed_sms = receiver, (capability, name), sms
    try:
        yield
    finally:
        _receiver, _assumed, _assumed_sms = before


def is_dry_run() -> bool:
    """Whether launches are only looked at."""
    return _receiver is not None


def device(x: torch.Tensor) -> tuple[int, str]:
    """Compute capability (90 for sm_90; 80 for what is not NVIDIA's) and name of a device; 0 for the interpreter."""
    if _assumed is not None:
        return _assumed
    if x.device.type not in machine.GPUS:
        return 0, "interpreter"
    # AMD's and Intel's devices get the tiles that ask the least of a device.
    return machine.compute_capability(x.device) or LEAST, machine.name(x.device)


def num_sms(x: torch.Tensor) -> int:
    """Streaming multiprocessors of the tensor's device; 132, as in an H100 or H200, where it is no GPU."""
    if _assumed_sms is not None:
        return _assumed_sms
    return machine.num_multiprocessors(x.device)


def launch(kernel: Any, grid: int, *args: Any, tile: Tile, place: torch.Tensor, **constants: Any) -> None:
    """Launch ``grid`` programs of a kernel on the device of ``place``."""
    if grid == 0:
        return
    # Named, for Triton 3.10 turns fusion off: multiply-adds are half of a softmax's work.
    compiler = {"num_warps": tile.num_warps, "num_stages": tile.num_stages, "enable_fp_fusion": True}
    options = {**constants, **compiler}
    if _receiver is not None:
        _receiver(kernel, grid, args, options)
    elif not machine.is_current(place.device):
        with torch.get_device_module(place.device).device(place.device):
            kernel[(grid,)](*args, **options)
    else:
        kernel[(grid,)](*args, **options)
