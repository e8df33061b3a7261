"""The library of CUDA kernels that this process loads, or the reason why there is none.

A file is the installed package's own, or one in the cache folder that was built from the same sources by the nvcc that
is here. The environment variable ``FASTPREFIX_CUDA`` is read once: 0 switches the library off, a path names the file to
load in its place, which then has to load.
"""

from __future__ import annotations

import functools
import hashlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..errors import fail
from ..machine.files import cache_dir
from . import build as builder
from .build import BuildError

VARIABLE = "FASTPREFIX_CUDA"
NAMESPACE = "fastprefix_cuda"  # of torch, in which csrc/cuda/operators.cpp registers the operators
RECORD = "_cuda_absent.txt"  # why an install did not build it
PACKAGE = Path(__file__).resolve().parent.parent
PATIENCE = 600.0  # seconds that another process may take to build the same file


class Library(NamedTuple):
    """Its operators and file, or None and in one line why it is absent."""

    ops: Any
    absence: str
    path: Path | None = None


_lock = threading.RLock()
_found: dict[bool, Library] = {}  # by whether all was tried


def load(build: bool = False) -> Library:
    """The library, looked for once in a process, and with ``build`` built once where that is possible."""
    found = _found.get(True) or _found.get(build)
    if found is None:
        with _lock:
            found = _found.get(True) or _found.get(build) or _load(build)
            _found[build or found.ops is not None] = found
    return found


def forget() -> None:
    """Look again at the next call. What was loaded stays in the process."""
    _found.clear()


@functools.cache
def digest(path: Path) -> str:
    """A short name of a library's content."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _load(build: bool) -> Library:
    setting = os.environ.get(VARIABLE, "")
    if setting == "0":
        return Library(None, f"the CUDA library is switched off by {VARIABLE}=0")
    if setting:
        path = Path(setting)
        if not path.is_file():
            raise fail(VARIABLE, path, "0 or the file of a library of CUDA kernels")
        return _loaded(path)
    try:
        _check_torch()
        sources = builder.find_sources(PACKAGE)
        path = PACKAGE / builder.installed_name(sources)
        return _loaded(path if path.is_file() else _cached(sources, build))
    except (BuildError, OSError) as error:
        return Library(None, f"the CUDA library is absent: {' '.join(str(error).split())}")


def _loaded(path: Path) -> Library:
    torch.ops.load_library(path)
    return Library(getattr(torch.ops, NAMESPACE), "", path)


def _check_torch() -> None:
    if not sys.platform.startswith("linux"):
        raise BuildError(f"it is for Linux, and this is {sys.platform}")
    if torch.version.hip is not None:
        raise BuildError(f"this torch, {torch.__version__}, is for AMD's devices")
    if torch.version.cuda is None:
        raise BuildError(f"this torch, {torch.__version__}, has no CUDA")


def _cached(sources: builder.Sources, build: bool) -> Path:
    """The file in the cache folder, built there where it is to be."""
    try:
        folder = cache_dir() / "cuda"
    except RuntimeError as error:  # a user without a home
        raise BuildError("there is no cache folder to build it in") from error
    if not build and not folder.is_dir():
        raise BuildError(_not_built())
    nvcc = builder.find_nvcc()
    path = folder / f"{builder.NAME}.{builder.key(sources, nvcc)}.so"
    if not path.is_file():
        if not build:
            raise BuildError(_not_built())
        with _alone(path.with_suffix(".lock")):
            if not path.is_file():  # another process may have built it meanwhile
                _build(path, sources, nvcc)
    return path


def _build(path: Path, sources: builder.Sources, nvcc: builder.Nvcc) -> None:
    start = time.monotonic()
    _say(f"fastprefix: building the CUDA kernels with nvcc {nvcc.version}, once ...")
    try:
        builder.build(path, sources, nvcc, Path(torch.__file__).parent)
    except BuildError as error:
        _say(f" {error}\n")
        if not error.output:
            raise
        log = path.with_suffix(".log")
        log.write_text(error.output)
        raise BuildError(f"{error} ({log})") from error
    _say(f" {time.monotonic() - start:.1f} s\n")


def _not_built() -> str:
    """The install's own reason, and what helps."""
    try:
        reason = (PACKAGE / RECORD).read_text().strip()
    except OSError:
        reason = "it was not built with this copy of the package"
    return f"{reason}; `fastprefix verify`, or backend='cuda' by name, builds it where there is nvcc"


@contextmanager
def _alone(file: Path) -> Iterator[None]:
    """Hold a lock, so that one process builds and the others wait; without locks each builds a file of its own."""
    from filelock import FileLock, Timeout

    file.parent.mkdir(parents=True, exist_ok=True)
    held = FileLock(file)
    try:
        held.acquire(timeout=PATIENCE)
    except (Timeout, NotImplementedError):  # the last on file systems without locks
        yield
        return
    try:
        yield
    finally:
        held.release()


def _say(text: str) -> None:
    if sys.stderr is not None:
        sys.stderr.write(text)
        sys.stderr.flush()
