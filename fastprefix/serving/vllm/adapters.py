"""``AdapterFolder``: a folder of adapters, each read and checked when a request first names it."""

from __future__ import annotations

import threading
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastprefix.errors import fail
from fastprefix.hf.storage.atomic_folder import COMMIT, STAGING, resolve_path
from fastprefix.hf.storage.peft_format import (
    CONFIG,
    EMBEDDINGS,
    OWN_CONFIG,
    WEIGHTS,
    check_geometry,
    errors_naming,
    stored_key_values,
)
from fastprefix.hf.storage.saved_adapter import FILES, SavedAdapter
from fastprefix.prefixes.config import PrefixConfig
from fastprefix.prefixes.prefix import Prefix
from fastprefix.prefixes.prompt import PromptConfig
from fastprefix.serving.vllm.geometry import Geometry
from fastprefix.serving.vllm.naming import UnknownPrefix, check_name
from fastprefix.serving.vllm.placeholders import content_digest
from fastprefix.serving.vllm.soft_prompt import run_in_child
from fastprefix.serving.vllm.spool import Spool

Stamp = tuple[Any, ...]


@dataclass(frozen=True)
class Entry:
    """A prefix that can be served."""

    name: str
    digest: str  # of its keys and values
    tokens: int  # P
    path: str  # of the spool's file


@dataclass(frozen=True)
class _Read:
    """What came of reading an adapter whose files had this stamp."""

    stamp: Stamp
    entry: Entry | None
    error: str


class AdapterFolder:
    """The adapters in a folder, one folder each, by name.

    A folder that appears, changes or disappears is seen by the next request that names it.
    """

    def __init__(self, folder: Path, geometry: Geometry, spool: Spool) -> None:
        self.folder, self.geometry, self.spool = folder, geometry, spool
        self._found: dict[str, _Read] = {}
        self._locks: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)

    def names(self) -> list[str]:
        """Names of the folders that hold an adapter, whether or not it can be served."""
        try:
            found = sorted(path.name for path in self.folder.iterdir() if (path / CONFIG).is_file())
        except OSError:
            return []
        return [name for name in found if self._is_name(name)]

    def has(self, name: object) -> bool:
        """Whether there is an adapter of this name."""
        return isinstance(name, str) and self._is_name(name) and _is_adapter(self.folder / name)

    def get(self, name: str) -> Entry:
        """The prefix of a name, read unless its files are the ones that were read before.

        Raises:
            UnknownPrefix: there is no such adapter.
            ValueError: a file is broken, or the prefix does not fit the model or cannot be served by vLLM.
        """
        path = self.folder / check_name(name)
        if not _is_adapter(path):
            self._found.pop(name, None)
            raise UnknownPrefix(f"prefix: no adapter {name!r} in the server's folder of adapters")
        with self._locks[name]:
            stamp = _stamp(path)
            found = self._found.get(name)
            if found is None or found.stamp != stamp:
                found = self._found[name] = self._read(name, path, stamp)
        if found.entry is None:
            raise ValueError(found.error)
        return found.entry

    def _read(self, name: str, path: Path, stamp: Stamp) -> _Read:
        try:
            tensors = read(path, self.geometry)
            digest = content_digest(tensors)
            entry = Entry(name, digest, tensors["k.0"].shape[1], str(self.spool.put(digest, tensors)))
        except (ValueError, OSError) as error:
            # A client need not know where the server keeps its files.
            return _Read(stamp, None, f"prefix {name!r}: {str(error).replace(f'{self.folder}/', '')}")
        return _Read(stamp, entry, "")

    @staticmethod
    def _is_name(name: str) -> bool:
        try:
            check_name(name)
        except UnknownPrefix:
            return False
        return True


def _is_adapter(path: Path) -> bool:
    try:
        return resolve_path(path, CONFIG).is_file()
    except (OSError, ValueError):
        return False


def _stamp(path: Path) -> Stamp:
    """A value that changes when one of an adapter's files is replaced."""
    found: list[Any] = []
    for name in (*FILES, f"{STAGING}/{COMMIT}"):
        try:
            stat = (path / name).stat()
            found.append((stat.st_ino, stat.st_mtime_ns, stat.st_size))
        except OSError:
            found.append(None)
    return tuple(found)


@torch.no_grad()
def read(folder: Path, geometry: Geometry) -> dict[str, Tensor]:
    """The keys ``k.<layer>`` and values ``v.<layer>`` ``[H_kv, P, D]`` of an adapter, as they stand at positions
    0..P-1.

    Raises:
        ValueError: the files are broken or do not fit, or vLLM cannot serve what they hold; path and field are named.
        OSError: a file cannot be read.
    """
    saved = SavedAdapter(folder)
    refuse(saved)
    if isinstance(saved.config, PromptConfig):
        saved.check_prompt(saved.config, geometry.hidden_size)
        tensors = run_in_child(geometry, saved.tensors[EMBEDDINGS])
    else:
        tensors = _key_values(saved, geometry)
    cast = {name: x.to(geometry.dtype) for name, x in tensors.items()}
    for name, x in cast.items():
        if not x.isfinite().all():
            raise fail(
                f"{saved.paths[WEIGHTS]}: {name}", "numbers that are infinite in it", f"some in {geometry.dtype}"
            )
    return cast


def _key_values(saved: SavedAdapter, geometry: Geometry) -> dict[str, Tensor]:
    config = saved.config
    assert isinstance(config, PrefixConfig)
    path = saved.paths[OWN_CONFIG if saved.own is not None else CONFIG]
    with errors_naming(path):
        indices = config.active_layers((None,) * geometry.layers)
    if len(indices) < geometry.layers:
        got = f"{len(indices)} of {geometry.layers} layers"
        raise fail(f"{path}: layers", got, "all of them: vLLM's cache has the same tokens in every layer")
    prefix = Prefix(config, geometry.shapes, indices)
    keys, values = stored_key_values(saved.tensors, prefix, saved.paths[WEIGHTS])
    if EMBEDDINGS in saved.tensors:
        check_geometry(saved.peft, prefix, saved.paths[CONFIG])
    saved.check_whole()
    if config.position_offset == "none":
        if geometry.rotate is None:
            raise fail(f"{path}: position_offset", "'none'", f"'after_prefix': {geometry.no_rotation}")
        # vLLM numbers the text from P, where such a prefix was trained with one from 0. Keys that move on with the text
        # leave every difference of positions as it was.
        keys = [geometry.rotate(k.float(), prefix.num_virtual_tokens) for k in keys]
    named = ((f"{n}.{i}", x) for n, part in (("k", keys), ("v", values)) for i, x in enumerate(part))
    return {name: x.contiguous() for name, x in named}


def refuse(saved: SavedAdapter) -> None:
    """Raise ValueError for an adapter that has more than keys and values in front of a text."""
    config, path = saved.config, saved.paths[OWN_CONFIG if saved.own is not None else CONFIG]
    expected = "a prefix of keys and values, or a soft prompt: vLLM's attention has nothing else"
    if isinstance(config, PromptConfig):
        if config.place != "before":
            raise fail(f"{path}: place", repr(config.place), "'before': vLLM's cache begins with the prefix")
    elif not isinstance(config, PrefixConfig):
        raise fail(f"{path}: kind", type(config).__name__.removesuffix("Config"), expected)
    else:
        for name in ("gate", "prefix_bias", "parts"):
            if value := getattr(config, name):
                raise fail(f"{path}: {name}", repr(value), expected)
    if saved.modules or saved.trained or saved.frozen:
        got = ", ".join([*saved.trained, *saved.frozen]) or next(iter(saved.modules))
        raise fail(f"{path}: modules_to_save", got, "none: the served model's modules are one for all requests")
