"""What a user installs: one wheel with the kernels, their tables and the types' marker, under one version."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import fastprefix

ROOT = Path(fastprefix.__file__).parent.parent


def test_the_wheel_holds_everything(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    ignored = shutil.ignore_patterns("__pycache__", "_triton")
    for folder in ("fastprefix", "kernels"):
        shutil.copytree(ROOT / folder, source / folder, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*command, "-w", str(tmp_path), str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.split("-")[1] == fastprefix.__version__
    held = set(zipfile.ZipFile(wheel).namelist())
    kernels = {f"fastprefix/_triton/{path.name}" for path in (ROOT / "kernels" / "triton").glob("*.py")}
    modules = {path.relative_to(source).as_posix() for path in (source / "fastprefix").rglob("*.py")}
    tables = {f"fastprefix/backends/launch/tiles/{name}.json" for name in ("interpreter", "sm_80", "sm_90")}
    assert kernels | modules | tables | {"fastprefix/py.typed"} <= held
    assert not any(name.startswith(("kernels/", "hub/", "tests/")) for name in held)
