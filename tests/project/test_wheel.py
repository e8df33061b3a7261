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

import fastprefix

ROOT = Path(fastprefix.__file__).parent.parent
RECORD = "fastprefix/_C_absent.txt"


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


def wheel(source: Path, out: Path, **environment: str) -> zipfile.ZipFile:
    """The wheel that pip makes of a folder or an archive, under other environment variables."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    given = {**os.environ, **environment}
    done = subprocess.run([*command, "-w", str(out), str(source)], env=given, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = out.glob("*.whl")
    assert path.name.split("-")[1] == fastprefix.__version__
    return zipfile.ZipFile(path)


def test_the_wheel_holds_everything(source: Path, tmp_path: Path) -> None:
    # A library of another build, and its record, are no part of this one.
    for name in ("_C.cpython-399-x86_64-linux-gnu.so", "_C_absent.txt"):
        (source / "fastprefix" / name).write_text("of an editable install")
    found = wheel(source, tmp_path, FASTPREFIX_BUILD_NATIVE="0")
    held = set(found.namelist())
    kernels = {f"fastprefix/_triton/{path.name}" for path in (ROOT / "kernels" / "triton").glob("*.py")}
    modules = {path.relative_to(source).as_posix() for path in (source / "fastprefix").rglob("*.py")}
    tables = {f"fastprefix/backends/launch/tiles/{name}.json" for name in ("interpreter", "sm_80", "sm_90")}
    assert kernels | modules | tables | {"fastprefix/py.typed"} <= held
    assert not any(name.startswith(("kernels/", "csrc/", "hub/", "tests/")) for name in held)
    assert [name for name in held if "/_C" in name] == [RECORD]
    assert found.read(RECORD).decode() == "it was left out by FASTPREFIX_BUILD_NATIVE=0\n"


@pytest.mark.slow
def test_an_sdist_that_cannot_be_compiled_is_installed_with_the_reason(source: Path, tmp_path: Path) -> None:
    """And one that can is compiled from the same files: the archive has all of them."""
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})"
    # The archive has the sources even where nothing can be built.
    given = {**os.environ, "FASTPREFIX_BUILD_NATIVE": "0"}
    subprocess.run([sys.executable, "-c", code], cwd=source, env=given, capture_output=True, check=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        held = {name.partition("/")[2] for name in opened.getnames()}
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*.*") if path.is_file()}
    assert sources | {"setup.py"} <= held
    broken = str(shutil.which("false"))
    found = wheel(archive, tmp_path, CXX=broken, FASTPREFIX_BUILD_NATIVE="")
    assert [name for name in found.namelist() if "/_C" in name] == [RECORD]
    # The compiler is not reached where something else is in the way.
    reasons = ("the build failed (", "Python's headers", "its kernels are for")
    assert found.read(RECORD).decode().startswith(reasons)
