"""What the operator asks of a device's driver, and of the processor, and no other module of it asks.

Tests replace functions of this module to stand in for a device that is not there.
"""

from __future__ import annotations

import functools
import platform
import re
from pathlib import Path
from typing import Any

import torch

# Devices with a runtime of their own in torch for which Triton compiles: NVIDIA's and AMD's are both "cuda".
GPUS = ("cuda", "xpu")


def kind(place: torch.device) -> str:
    """``cpu``, ``cuda`` (NVIDIA's and AMD's), ``xpu`` and so on."""
    return place.type


def index(place: torch.device) -> int:
    """The number of a device among those of its kind; the current one's where it is not said."""
    given: int | None = place.index
    if given is not None:
        return given
    return int(_module(place).current_device()) if kind(place) in GPUS else 0


@functools.cache
def name(place: torch.device) -> str:
    """The name that the processor or the graphics card gives itself."""
    if kind(place) in GPUS:
        return str(_module(place).get_device_name(place))
    return _processor()


@functools.cache
def capability(place: torch.device) -> str:
    """What a device can do: ``sm_90``, ``gfx942``, ``AVX512``; empty where nothing is known."""
    match kind(place):
        case "cpu":
            return torch.backends.cpu.get_cpu_capability()
        case "cuda" if torch.version.hip is not None:
            return str(_properties(place).gcnArchName)
        case "cuda":
            return f"sm_{compute_capability(place)}"
        case "xpu":
            return str(getattr(_properties(place), "architecture", ""))
    return ""


@functools.cache
def compute_capability(place: torch.device) -> int:
    """An NVIDIA device's compute capability, 90 for sm_90; 0 for every other device."""
    if kind(place) != "cuda" or torch.version.hip is not None:
        return 0
    major, minor = torch.cuda.get_device_capability(place)
    return 10 * major + minor


@functools.cache
def num_multiprocessors(place: torch.device) -> int:
    """Streaming multiprocessors (compute units) of a GPU; 132, as in an H100 or H200, where it is none or unknown."""
    if kind(place) not in GPUS:
        return 132
    found = _properties(place)
    return int(getattr(found, "multi_processor_count", 0) or getattr(found, "gpu_subslice_count", 0) or 132)


@functools.cache
def driver(place: torch.device) -> str:
    """The version of the driver and of the runtime that torch was built with, as text to compare."""
    if kind(place) not in GPUS:
        return ""
    try:
        module = re.search(r"Kernel Module.*?(\d+(?:\.\d+)+)", Path("/proc/driver/nvidia/version").read_text())
    except OSError:
        module = None
    properties: Any = _properties(place)
    parts = [module and module[1], torch.version.cuda, torch.version.hip, getattr(properties, "driver_version", None)]
    if kind(place) == "cuda":  # a wheel of cuDNN changes without torch, and containers may hide the driver's file
        parts += [f"cudnn {torch.backends.cudnn.version()}", getattr(torch._C, "_cuda_getDriverVersion", int)()]
    return " ".join(str(part) for part in parts if part)


def free_memory(place: torch.device) -> int | None:
    """Free bytes of a GPU, or all that it has where this process does not use it yet; None where nothing says."""
    if kind(place) not in GPUS:
        return None
    if kind(place) == "cuda" and torch.cuda.memory_reserved(place):  # otherwise the question would make a context
        return int(torch.cuda.mem_get_info(place)[0])
    return int(getattr(_properties(place), "total_memory", 0)) or None


def is_here(place: torch.device) -> bool:
    """Whether torch finds a device; asked without using it."""
    if kind(place) not in GPUS:
        return kind(place) == "cpu"
    module: Any = getattr(torch, kind(place))
    return bool(module.is_available()) and (place.index or 0) < int(module.device_count())


def is_capturing(place: torch.device) -> bool:
    """Whether the current stream records a graph."""
    return kind(place) == "cuda" and torch.cuda.is_current_stream_capturing()


def is_current(place: torch.device) -> bool:
    """Whether new work of this process goes to the device by itself."""
    return kind(place) not in GPUS or place.index is None or place.index == _module(place).current_device()


def synchronize(place: torch.device) -> None:
    """Wait until a device has finished its work, and raise any error of it."""
    if kind(place) in GPUS:
        _module(place).synchronize(place)


def empty_cache(place: torch.device) -> None:
    """Give memory that torch keeps for later back to a GPU."""
    if kind(place) in GPUS:
        _module(place).empty_cache()


def default() -> torch.device:
    """The first GPU that torch was built for and finds, else the processor."""
    for each in GPUS:
        module: Any = getattr(torch, each)
        if module.is_available():
            return torch.device(each, module.current_device())
    return torch.device("cpu")


def _module(place: torch.device) -> Any:
    return torch.get_device_module(place)


def _properties(place: torch.device) -> Any:
    return _module(place).get_device_properties(place)


def _processor() -> str:
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()
