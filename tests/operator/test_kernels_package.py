"""The kernels that are launched are those of the package that launches them, whatever else is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fastprefix

ROOT = Path(fastprefix.__file__).parent.parent
PRINT_FOLDER = "from fastprefix._triton import primitives; print(primitives.__file__)"


def copied(folder: Path, *, kernels: bool) -> Path:
    """A copy of the checkout's sources, with or without the kernels."""
    ignored = shutil.ignore_patterns("__pycache__", "_triton")
    shutil.copytree(ROOT / "fastprefix", folder / "fastprefix", ignore=ignored)
    if kernels:
        shutil.copytree(ROOT / "kernels", folder / "kernels", ignore=ignored)
    return folder


def imported(folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    """What Python says to ``code`` with the copy first on its path."""
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    return subprocess.run([sys.executable, "-c", code], env=environment, cwd=folder, capture_output=True, text=True)


@pytest.mark.parametrize("linked", [False, True])
def test_a_copied_checkout_runs_its_own_kernels(tmp_path: Path, linked: bool) -> None:
    pytest.importorskip("triton")
    folder = copied(tmp_path, kernels=True)
    if linked:
        (folder / "fastprefix" / "_triton").symlink_to("../kernels/triton")
    done = imported(folder, PRINT_FOLDER)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).resolve() == (folder / "kernels" / "triton" / "primitives.py").resolve()


def test_kernels_inside_the_package_come_first(tmp_path: Path) -> None:
    """As in a wheel, which holds them in a folder of the package."""
    pytest.importorskip("triton")
    folder = copied(tmp_path, kernels=True)
    shutil.copytree(folder / "kernels" / "triton", folder / "fastprefix" / "_triton")
    done = imported(folder, PRINT_FOLDER)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).resolve() == (folder / "fastprefix" / "_triton" / "primitives.py").resolve()


def test_a_copy_without_kernels_says_so(tmp_path: Path) -> None:
    folder = copied(tmp_path, kernels=False)
    done = imported(folder, PRINT_FOLDER)
    assert done.returncode != 0
    assert "ImportError" in done.stderr and str(folder / "kernels" / "triton") in done.stderr
