"""Processes that need the library at once or one after the other: one builds it, with a real compiler too."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.cuda.compiled.binaries import nvcc
from tests.cuda.libraries import ROOT, sources

pytestmark = pytest.mark.slow
KERNEL = Path(__file__).with_name("fill_decode.cu")


PROCESS = """
import sys, time
from pathlib import Path
import torch
torch.version.cuda = "13.0"
from fastprefix.cuda_library import build, library
library.PACKAGE = Path(sys.argv[1])
if len(sys.argv) > 2:
    def slow(out, *rest):
        time.sleep(1.0)
        out.write_text("a library")
    build.build, library._loaded = slow, lambda path: library.Library(object(), "", path)
found = library.load(build=True)
assert found.absence == "", found.absence
print(found.path)
print(found.ops.decode.default._schema if len(sys.argv) == 2 else "")
"""


def start(package: Path, cache: Path, *rest: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROCESS, str(package), *rest]
    given = {
        "PYTHONPATH": str(ROOT),
        "FASTPREFIX_CACHE": str(cache),
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "MAX_JOBS": "1",
    }
    return subprocess.Popen(command, env=given, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def package_with(kernel: Path, folder: Path) -> Path:
    """An installed package's sources."""
    files = sources(folder / "_cuda", kernel)
    (folder / "_cuda_operators").mkdir()
    for path in files.operators.glob("*"):
        (folder / "_cuda_operators" / path.name).write_bytes(path.read_bytes())
    return folder


def test_two_processes_at_once(tmp_path: Path) -> None:
    """One builds and the other waits for it."""
    nvcc()
    package = package_with(KERNEL, tmp_path / "package")
    processes = [start(package, tmp_path / "cache", "slow") for _ in range(2)]
    said = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert len({out for out, _ in said}) == 1
    assert sum("building the CUDA kernels" in err for _, err in said) == 1


def test_a_real_one_is_built_and_loaded_here(tmp_path: Path) -> None:
    """By nvcc, under a torch without CUDA, in a process of its own; the next process finds it."""
    nvcc()
    package = package_with(KERNEL, tmp_path / "package")
    first = start(package, tmp_path / "cache").communicate(timeout=120)
    again = start(package, tmp_path / "cache").communicate(timeout=120)
    assert "fastprefix_cuda::decode(Tensor q, Tensor k, " in first[0], first
    assert again[0] == first[0] and "building" in first[1] and again[1] == ""
