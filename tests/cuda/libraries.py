"""Libraries of the operators in ``csrc/cuda``, compiled for tests: with kernels of a test's own, or without CUDA."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from filelock import FileLock

import fastprefix
from fastprefix.cuda_library import build
from tests.cuda.compiled.binaries import KERNELS

ROOT = Path(fastprefix.__file__).parent.parent
OPERATORS = ROOT / "csrc" / "cuda"
TORCH = Path(torch.__file__).parent


def sources(folder: Path, *kernels: Path) -> build.Sources:
    """A folder with these kernels and the headers of ``kernels/cuda``, and the operators of the checkout."""
    folder.mkdir(parents=True, exist_ok=True)
    headers = [path for path in KERNELS.rglob("*") if path.suffix in (".h", ".cuh")]
    for path, name in (
        *((path, path.relative_to(KERNELS)) for path in headers),
        *((path, path.name) for path in kernels),
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder / name)
    return build.Sources(folder, OPERATORS)


def compile_host(out: Path, namespace: str, files: Sequence[Path], options: Sequence[str] = ()) -> None:
    """A library whose operators take tensors of a processor, and call what these C++ files define."""
    command = [*build._compiler(), *build.HOST, f"-DFASTPREFIX_LIBRARY={namespace}", "-DFASTPREFIX_EMULATED", *options]
    command += [f"-I{KERNELS}", f"-I{OPERATORS}", f"-isystem{TORCH / 'include'}", "-shared", "-o", str(out)]
    command += [*map(str, [*sorted(OPERATORS.glob("*.cpp")), *files]), f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-ldl"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stderr}"


def once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """A file that one worker of a session makes for all."""
    base = factory.getbasetemp()
    shared = base.parent if base.name.startswith("popen-") else base
    path = shared / name
    with FileLock(path.with_suffix(".lock")):
        if not path.is_file():
            make(path)
    return path
