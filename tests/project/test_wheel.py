"""What a user installs: one wheel with the kernels, their tables and the types' marker, under one version."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

import fastprefix
from tests.cuda.compiled.binaries import nvcc

ROOT = Path(fastprefix.__file__).parent.parent
RECORD = "fastprefix/_C_absent.txt"
CUDA_RECORD = "fastprefix/_cuda_absent.txt"
LEFT_OUT = {"FASTPREFIX_BUILD_NATIVE": "0", "FASTPREFIX_BUILD_CUDA": "0"}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of what packages are made from, as a checkout has it: without what an editable install leaves in it."""
    folder = tmp_path / "source"
    folder.mkdir()
    ignored = shutil.ignore_patterns("__pycache__", "_triton", "_C*", "*.so", "_cuda_absent.txt")
    for name in ("fastprefix", "kernels", "csrc"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


def make_wheel(source: Path, out: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Have pip make a wheel of a folder or an archive, under other environment variables."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    given = {**os.environ, **environment}
    return subprocess.run([*command, "-w", str(out), str(source)], env=given, capture_output=True, text=True)


def wheel(source: Path, out: Path, **environment: str) -> zipfile.ZipFile:
    """The wheel that pip makes."""
    done = make_wheel(source, out, **environment)
    assert done.returncode == 0, done.stderr
    (path,) = out.glob("*.whl")
    assert path.name.split("-")[1] == fastprefix.__version__
    return zipfile.ZipFile(path)


def test_the_wheel_holds_everything(source: Path, tmp_path: Path) -> None:
    # A library of another build, and its record, are no part of this one.
    others = ("_C.cpython-399-x86_64-linux-gnu.so", "_C_absent.txt", "libfastprefix_cuda.0.so", "_cuda_absent.txt")
    for name in others:
        (source / "fastprefix" / name).write_text("of an editable install")
    found = wheel(source, tmp_path, **LEFT_OUT)
    held = set(found.namelist())
    kernels = {f"fastprefix/_triton/{path.name}" for path in (ROOT / "kernels" / "triton").glob("*.py")}
    modules = {path.relative_to(source).as_posix() for path in (source / "fastprefix").rglob("*.py")}
    tables = {f"fastprefix/backends/launch/tiles/{name}.json" for name in ("interpreter", "sm_80", "sm_90")}
    cuda = ROOT / "kernels" / "cuda"
    compiled = {f"fastprefix/_cuda/{path.relative_to(cuda).as_posix()}" for path in cuda.rglob("*.*")}
    compiled |= {f"fastprefix/_cuda_operators/{path.name}" for path in (ROOT / "csrc" / "cuda").glob("*.*")}
    assert kernels | modules | tables | compiled | {"fastprefix/py.typed"} <= held
    assert not any("libfastprefix_cuda" in name for name in held)
    assert found.read(CUDA_RECORD).decode() == "it was left out by FASTPREFIX_BUILD_CUDA=0\n"
    assert not any(name.startswith(("kernels/", "csrc/", "hub/", "tests/")) for name in held)
    assert [name for name in held if "/_C" in name] == [RECORD]
    assert found.read(RECORD).decode() == "it was left out by FASTPREFIX_BUILD_NATIVE=0\n"


@pytest.mark.slow
def test_an_sdist_that_cannot_be_compiled_is_installed_with_the_reason(source: Path, tmp_path: Path) -> None:
    """And one that can is compiled from the same files: the archive has all of them."""
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})"
    # The archive has the sources even where nothing can be built.
    given = {**os.environ, **LEFT_OUT}
    subprocess.run([sys.executable, "-c", code], cwd=source, env=given, capture_output=True, check=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        held = {name.partition("/")[2] for name in opened.getnames()}
    files = [*(ROOT / "csrc").rglob("*.*"), *(ROOT / "kernels" / "cuda").rglob("*.*")]
    sources = {path.relative_to(ROOT).as_posix() for path in files if path.is_file()}
    assert sources | {"setup.py"} <= held
    broken = str(shutil.which("false"))
    found = wheel(archive, tmp_path, CXX=broken, FASTPREFIX_BUILD_NATIVE="")
    assert [name for name in found.namelist() if "/_C" in name] == [RECORD]
    # The compiler is not reached where something else is in the way.
    reasons = ("the build failed (", "Python's headers", "its kernels are for")
    assert found.read(RECORD).decode().startswith(reasons)


@pytest.mark.slow
@pytest.mark.skipif(torch.version.cuda is not None, reason="it is built there")
def test_the_cuda_kernels_are_built_where_they_are_asked_for(source: Path, tmp_path: Path) -> None:
    """A torch without CUDA has no use for them, but can build them."""
    found = wheel(source, tmp_path / "plain", FASTPREFIX_BUILD_NATIVE="0", FASTPREFIX_BUILD_CUDA="")
    assert found.read(CUDA_RECORD).decode() == f"the torch of the build, {torch.__version__}, had no CUDA\n"
    nvcc()
    # The real kernels take a minute, and tests/cuda/test_compile.py builds them.
    source = shutil.copytree(source, tmp_path / "stand_in")
    for kernel in (source / "kernels" / "cuda").glob("*.cu"):
        kernel.unlink()
    shutil.copy(ROOT / "tests" / "cuda" / "fill_decode.cu", source / "kernels" / "cuda")
    asked = {"FASTPREFIX_BUILD_NATIVE": "0", "FASTPREFIX_BUILD_CUDA": "1"}
    held = wheel(source, tmp_path / "asked", **asked).namelist()
    assert CUDA_RECORD not in held
    assert len([name for name in held if name.startswith("fastprefix/libfastprefix_cuda.")]) == 1
    done = make_wheel(source, tmp_path / "failed", **asked, CUDA_HOME=str(tmp_path))
    told = f"FASTPREFIX_BUILD_CUDA=1 asks for the CUDA kernels: CUDA_HOME: got {tmp_path}, expected a CUDA toolkit"
    assert done.returncode != 0 and told in done.stdout + done.stderr
