"""What a verdict holds for: a device, its driver, torch, Triton, and the package's own kernels."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Iterator
from pathlib import Path

import torch

from .._extension import load
from ..cuda_library import library
from ..machine import device

PACKAGE = Path(__file__).resolve().parent.parent
# Folders and modules of the package whose text decides what a backend computes, and how it is judged.
JUDGED = ("backends", "verification", "masks.py", "reference.py", "types.py")

Identity = dict[str, str]


def identity(place: torch.device) -> Identity:
    """The facts under which a table is remembered; another value of any makes it another's."""
    # How a call is cut on a processor, and so its result and time, depends on the number of threads.
    threads = str(torch.get_num_threads()) if device.kind(place) == "cpu" else ""
    return {
        "device": device.name(place),
        "kind": device.kind(place),
        "capability": device.capability(place),
        "driver": device.driver(place),
        "threads": threads,
        "torch": torch.__version__,
        "triton": _triton_version() + (" interpreted" if _is_interpreted() else ""),
        "sources": sources(os.environ.get("FASTPREFIX_TILES")),
        "cuda": _cuda_library() if device.kind(place) == "cuda" else "",
    }


def digest(found: Identity) -> str:
    """A short name of an identity, for a file's."""
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:12]


@functools.cache
def sources(tiles: str | None = None) -> str:
    """A hash of the sources, and of the table of tiles that the user names."""
    found = hashlib.sha256()
    for path in _files(tiles):
        found.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()[:16]


def _files(tiles: str | None) -> Iterator[Path]:
    installed = PACKAGE / "_triton"
    kernels = installed if installed.is_dir() else PACKAGE.parent / "kernels" / "triton"
    for place in (*(PACKAGE / name for name in JUDGED), kernels):
        if place.is_dir():
            yield from sorted(path for end in ("py", "json") for path in place.rglob(f"*.{end}"))
        elif place.is_file():
            yield place
    if tiles and Path(tiles).is_file():
        yield Path(tiles)
    extension, _ = load()
    if extension is not None and extension.__file__:
        yield Path(extension.__file__)


def _cuda_library() -> str:
    """What the library of CUDA kernels holds: its compiler decides, with the sources, what its kernels compute."""
    path = library.load().path
    return "none" if path is None else library.digest(path)


@functools.cache
def _triton_version() -> str:
    for name in ("triton", "pytorch-triton", "pytorch-triton-rocm", "pytorch-triton-xpu", "triton-xpu"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "none"


def _is_interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"
