"""The files that workers read: one for each prefix, named by its digest, which never change.

The front end writes such a file when a prefix is first named, in the model's dtype. Workers therefore never read an
adapter's own folder, in which a training run may be saving, and a request that is under way keeps its prefix if the
folder is removed.

    <cache>/serving/<random>/lock                   held by the server; the next removes a folder whose lock is free
    <cache>/serving/<random>/<digest>.safetensors   k.<layer> and v.<layer>: [H_kv, P, D]
"""

from __future__ import annotations

import importlib
import os
import shutil
import tempfile
import weakref
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from fastprefix.hf.storage.validated_files import write_tensors
from fastprefix.machine.files import cache_dir

# Without fcntl, folders of servers that were killed stay.
fcntl: Any = importlib.import_module("fcntl") if os.name == "posix" else None

LOCK, HIDDEN = "lock", ".new-"


def default_parent() -> Path:
    """Where the folders of servers are."""
    return cache_dir() / "serving"


class Spool:
    """A server's folder of prefixes; it is removed with the server, or after a kill by the next one."""

    def __init__(self, parent: Path | None = None) -> None:
        parent = default_parent() if parent is None else parent
        parent.mkdir(parents=True, exist_ok=True)
        _sweep(parent)
        # Only a folder that is locked gets a name which others look at.
        made = Path(tempfile.mkdtemp(dir=parent, prefix=HIDDEN))
        self._lock = _take(made / LOCK)
        self.folder = made.rename(made.with_name(made.name.removeprefix(HIDDEN)))
        self._remove = weakref.finalize(self, _close, self.folder, self._lock, os.getpid())

    def put(self, digest: str, tensors: Mapping[str, Tensor]) -> Path:
        """The path of a prefix's file, written if there is none yet."""
        path = self.folder / f"{digest}.safetensors"
        if not path.exists():
            handle, part = tempfile.mkstemp(dir=self.folder)
            os.close(handle)
            try:
                write_tensors({name: x.contiguous() for name, x in tensors.items()}, part)
                os.replace(part, path)
            finally:
                Path(part).unlink(missing_ok=True)
        return path

    def close(self) -> None:
        """Remove the folder."""
        self._remove()


def _take(path: Path) -> int | None:
    """Open and lock a file; None where there are no locks. BlockingIOError if another process holds it."""
    if fcntl is None:
        return None
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        raise
    return handle


def _close(folder: Path, lock: int | None, owner: int) -> None:
    if os.getpid() != owner:  # a forked process, which has a copy of the object
        return
    shutil.rmtree(folder, ignore_errors=True)
    if lock is not None:
        os.close(lock)


def _sweep(parent: Path) -> None:
    """Remove the folders of servers that were killed."""
    for folder in parent.iterdir():
        if fcntl is None or folder.name.startswith(HIDDEN) or not (folder / LOCK).is_file():
            continue
        with suppress(OSError):
            handle = _take(folder / LOCK)
            shutil.rmtree(folder, ignore_errors=True)
            assert handle is not None
            os.close(handle)


class Resident:
    """The prefixes that a worker holds in memory, its own heads of its own layers: at most ``most``, by last use."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._found: OrderedDict[str, dict[int, tuple[Tensor, Tensor]]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._found)

    def get(self, path: str, layers: Mapping[int, Any], heads: slice) -> dict[int, tuple[Tensor, Tensor]]:
        """Keys and values ``[P, heads, D]`` of these layers.

        Raises:
            OSError, ValueError: the file cannot be read.
        """
        from safetensors import SafetensorError, safe_open

        if path not in self._found:
            try:
                with safe_open(path, framework="pt") as file:
                    self._found[path] = {
                        i: tuple(file.get_slice(f"{n}.{i}")[heads].transpose(0, 1).contiguous() for n in "kv")
                        for i in layers
                    }
            except SafetensorError as error:
                raise ValueError(f"{path}: {error}") from error
        self._found.move_to_end(path)
        while len(self._found) > self.most:
            self._found.popitem(last=False)
        return self._found[path]
