"""Compiles C++ that includes kernels, with the emulator's headers in the place of CUDA's instructions."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import shutil
import subprocess
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from filelock import FileLock

ROOT = Path(__file__).parents[2]
KERNELS = ROOT / "kernels/cuda"
# An automatic variable that nothing sets is a huge negative number, so that a forgotten initial value shows in results.
# Without unique symbols, two libraries of one process have a session each.
FLAGS = (
    *("-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-pthread"),
    *("-ftrivial-auto-var-init=pattern", "-fno-gnu-unique"),
    # Cheap accesses to thread_local variables, of which a process with many libraries has room for only few otherwise.
    *(("-mtls-dialect=gnu2",) if platform.machine() == "x86_64" else ()),
)


@functools.cache
def compiler() -> tuple[str, str]:
    """The C++ compiler and what it says about its version. Skips the test where there is none."""
    command = os.environ.get("CXX", "c++")
    if shutil.which(command) is None:
        pytest.skip(f"no C++ compiler: {command} is not installed")
    return command, subprocess.run([command, "--version"], capture_output=True, text=True, check=True).stdout


def library(
    source: str | Path,
    *,
    sources: Iterable[Path] = (),
    defines: Iterable[str] = (),
    include_first: Iterable[str | Path] = (),
    extra_flags: Iterable[str] = (),
    kernels: Path = KERNELS,
) -> Path:
    """The shared library made of a .cpp file, whose path is absolute or relative to the repository.

    ``sources`` are more .cpp files of the same library. ``defines`` are ``NAME`` or ``NAME=value``, and
    ``include_first`` are headers that come before everything; ``kernels`` is the folder of the kernels' sources. A
    library is compiled once for the same flags and the same text of itself, those headers, and all sources of the
    emulator, the kernels and its own folder, also when several processes want it.
    """
    command, version = compiler()
    first = [ROOT / header for header in include_first]
    includes = (ROOT / "tests/emulator", kernels)
    flags = [*FLAGS, *(f"-I{folder}" for folder in includes), *(f"-D{define}" for define in defines), *extra_flags]
    for header in first:
        flags += ["-include", str(header)]
    folders = (*includes, (ROOT / source).parent)
    headers = (
        path
        for folder in folders
        for ending in ("h", "hpp", "cuh", "cu")
        for path in sorted(folder.rglob(f"*.{ending}"))
    )
    sources = list(sources)
    texts = [ROOT / source, *sources, *first, *headers]
    digest = hashlib.sha256("\0".join([command, version, *flags]).encode())
    for path in texts:
        digest.update(path.name.encode() + path.read_bytes())
    folder = ROOT / "build/emulator" / digest.hexdigest()[:16]
    made = folder / f"{Path(source).stem}.so"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):
        if not made.exists():
            objects = [folder / f"{path.stem}.o" for path in (Path(source), *sources)]
            with ThreadPoolExecutor(2) as pool:
                compiled = [
                    (command, "-c", ROOT / path, *flags, "-o", x) for path, x in zip((source, *sources), objects)
                ]
                list(pool.map(_run, compiled))
            unfinished = made.with_suffix(".unfinished")
            _run((command, *objects, *flags, "-o", unfinished))
            unfinished.replace(made)
    return made


def _run(call: Iterable[str | Path]) -> None:
    done = subprocess.run(list(map(str, call)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
