"""The emulator's session in a compiled library: its options, the buffers that kernels may touch, and what it found."""

from __future__ import annotations

import ctypes
from enum import IntEnum
from pathlib import Path

from torch import Tensor


class Mode(IntEnum):
    """When an asynchronous copy arrives: as late as the kernel's waits allow, at once, or either by chance."""

    LATE = 0
    EAGER = 1
    RANDOM = 2


class Counters(ctypes.Structure):
    NAMES = ("mma", "ldmatrix", "bank_conflicts", "cp_async", "wgmma", "tma", "blocks", "switches")
    _fields_ = [(name, ctypes.c_uint64) for name in NAMES]


class Session:
    """One a library. ``library`` is the ctypes library, whose functions launch kernels."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        self.library.emulator_error.restype = ctypes.c_char_p
        self.library.emulator_error.argtypes = [ctypes.c_size_t]
        self.library.emulator_add_buffer.argtypes = [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        self.reset()

    def reset(
        self,
        mode: Mode = Mode.LATE,
        wgmma_mode: Mode = Mode.LATE,
        seed: int = 0,
        races: bool = True,
        workers: int = 1,
        multiprocessors: int = 132,
        capability: int = 90,
    ) -> None:
        """Forgets buffers and errors. With a seed other than 0, blocks and warps run in an order of chance."""
        options = (ctypes.c_uint64(seed), races, workers, multiprocessors, capability)
        self.library.emulator_reset(mode, wgmma_mode, *options)

    def add(self, name: str, x: Tensor, writable: bool = False) -> None:
        """Kernels may read, or read and write, from the first element of x to its last one."""
        elements = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride())) + 1 if x.numel() else 0
        self.library.emulator_add_buffer(name.encode(), x.data_ptr(), elements * x.element_size(), writable)

    @property
    def errors(self) -> list[str]:
        """At most 8, one of a kind, in the order in which they were found."""
        found: list[str] = []
        while (error := self.library.emulator_error(len(found))) is not None:
            found.append(error.decode())
        return found

    @property
    def counters(self) -> Counters:
        counters = Counters()
        self.library.emulator_counters(ctypes.byref(counters))
        return counters
