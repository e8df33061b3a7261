"""A CUDA file compiled for some kinds of device, and what is in it. Skips a test where a tool is missing."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

from fastprefix.cuda_library import build
from fastprefix.measure.kernels.sass import Function, parse, tool

KERNELS = Path(__file__).parents[3] / "kernels" / "cuda"


class Binary(NamedTuple):
    """A file with binaries, and what ptxas says about each of their kernels."""

    path: Path
    said: str

    def functions(self) -> dict[str, Function]:
        """Its kernels by name, where it is for one target."""
        return {function.name: function for function in parse(cuobjdump("-sass", self.path))}


def nvcc() -> build.Nvcc:
    """The compiler that is here; skips with the reason where there is none."""
    try:
        return build.find_nvcc()
    except build.BuildError as error:
        pytest.skip(str(error))


def cuobjdump(option: str, path: Path) -> str:
    """What cuobjdump prints of a binary; Triton's package has it."""
    try:
        command = [tool("cuobjdump", option), option, str(path)]
    except ValueError as error:
        pytest.skip(str(error))
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def compile_binary(source: Path, out: Path, *targets: str, kernels: Path = KERNELS) -> Binary:
    """Compile for targets such as sm_90a, with the headers of a folder of kernels."""
    command = [str(nvcc().path), "-std=c++17", "-O3", "-fatbin", "-Xptxas", "-v", f"-I{kernels}"]
    for target in targets:
        command += ["-gencode", f"arch={target.replace('sm', 'compute')},code={target}"]
    done = subprocess.run([*command, "-o", str(out), str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return Binary(out, done.stdout + done.stderr)
