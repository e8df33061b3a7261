"""All that the compile gate looks at: the shipped library's kernels, and those that Blackwell's devices would get."""

from __future__ import annotations

import pickle
import subprocess
from pathlib import Path
from typing import NamedTuple

from fastprefix.cuda_library import build
from tests.cuda.compiled.binaries import compile_binary
from tests.cuda.compiled.kernels import CompiledKernel, read_kernels
from tests.cuda.compiled.launch_shapes import LaunchShape, launch_shapes
from tests.cuda.compiled.real_library import TARGETS, words_of

BF16 = Path(__file__).with_name("bf16.cu")
BLACKWELL = ("sm_100", "sm_120")
ALL_TARGETS = (*TARGETS, *BLACKWELL)


class Collected(NamedTuple):
    """Kernels, how they are launched, by name, and what ptxas said about them."""

    kernels: list[CompiledKernel]
    shapes: dict[str, LaunchShape]
    said: str

    def of(self, target: str) -> list[CompiledKernel]:
        return [kernel for kernel in self.kernels if kernel.target == target]


def blackwell(nvcc: build.Nvcc) -> list[str]:
    """Those of its targets that a compiler knows: nvcc 12.8 was the first."""
    command = [str(nvcc.path), "--list-gpu-code"]
    known = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return [target for target in BLACKWELL if target in known]


def collect(library: Path, folder: Path) -> Collected:
    """Read a library of ``build_real``."""
    kernels, said = read_kernels(library), words_of(library).read_text()
    return Collected(kernels, launch_shapes((x.name for x in kernels), folder), said)


def collect_blackwell(nvcc: build.Nvcc, folder: Path) -> Collected:
    """Compile for Blackwell's devices; nothing where the compiler does not know them."""
    targets = blackwell(nvcc)
    if not targets:
        return Collected([], {}, "")
    binary = compile_binary(BF16, folder / "bf16.fatbin", *targets)
    kernels = read_kernels(binary.path)
    return Collected(kernels, launch_shapes((x.name for x in kernels), folder), binary.said)


def write(found: Collected, path: Path) -> None:
    path.write_bytes(pickle.dumps(found))


def load(path: Path) -> Collected:
    """What :func:`write` has written: reading the binaries takes ten times as long."""
    found = pickle.loads(path.read_bytes())
    assert isinstance(found, Collected)
    return found
