"""The one place that launches a kernel, and what it knows of the device."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from triton.runtime.interpreter import InterpretedFunction

from ..._triton.primitives import dot
from .tile_config import Tile

Launch = Callable[[Any, int, tuple[Any, ...], dict[str, Any]], object]

# While a dry run lasts: what receives each launch (kernel, grid, arguments, options) instead of the device, and the
# device that is assumed.
_receiver: Launch | None = None
_assumed: tuple[int, str] | None = None

# Whether Triton's interpreter runs the kernels, on the CPU.
INTERPRETER = isinstance(dot, InterpretedFunction)


@contextmanager
def dry_run(receiver: Launch, capability: int, name: str = "") -> Iterator[None]:
    """Launch nothing: hand every launch to ``receiver``, as on a device of ``capability`` (90 for sm_90)."""
    global _receiver, _assumed
    before = _receiver, _assumed
    _receiver, _assumed = receiver, (capability, name)
    try:
        yield
    finally:
        _receiver, _assumed = before


def is_dry_run() -> bool:
    """Whether launches are only looked at."""
    return _receiver is not None


def device(x: torch.Tensor) -> tuple[int, str]:
    """Compute capability (90 for sm_90) and name of a tensor's device; 0 for the interpreter."""
    if _assumed is not None:
        return _assumed
    return _device(x.device) if x.device.type == "cuda" else (0, "interpreter")


@functools.cache
def _device(place: torch.device) -> tuple[int, str]:
    major, minor = torch.cuda.get_device_capability(place)
    return 10 * major + minor, torch.cuda.get_device_name(place)


@functools.cache
def _num_sms(place: torch.device) -> int:
    return torch.cuda.get_device_properties(place).multi_processor_count


def num_sms(x: torch.Tensor) -> int:
    """Streaming multiprocessors of the tensor's device; 132, as in an H100 or H200, where it is no GPU."""
    return _num_sms(x.device) if x.device.type == "cuda" else 132


def launch(kernel: Any, grid: int, *args: Any, tile: Tile, place: torch.Tensor, **constants: Any) -> None:
    """Launch ``grid`` programs of a kernel on the device of ``place``."""
    if grid == 0:
        return
    # Named, for Triton 3.10 turns fusion off: multiply-adds are half of a softmax's work.
    compiler = {"num_warps": tile.num_warps, "num_stages": tile.num_stages, "enable_fp_fusion": True}
    options = {**constants, **compiler}
    if _receiver is not None:
        _receiver(kernel, grid, args, options)
    elif place.device.type == "cuda" and place.device.index != torch.cuda.current_device():
        with torch.cuda.device(place.device):
            kernel[(grid,)](*args, **options)
    else:
        kernel[(grid,)](*args, **options)
