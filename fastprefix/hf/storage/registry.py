"""``register``: prefixes that stay on disk until a batch names them."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fastprefix.errors import fail
from fastprefix.hf.adapters.attach import check_name
from fastprefix.hf.adapters.build import distribute
from fastprefix.hf.adapters.installation import Installation
from fastprefix.hf.adapters.lookup import find_installation, get_or_install, require_not_patched, uninstall
from fastprefix.hf.runtime.forward_context import Name
from fastprefix.hf.storage.atomic_folder import resolve_path
from fastprefix.hf.storage.hub import adapter_folder
from fastprefix.hf.storage.peft_format import CONFIG
from fastprefix.hf.storage.saved_adapter import FILES, SavedAdapter
from fastprefix.prefixes.prefix import Prefix
from fastprefix.prefixes.prompt import SoftPrompt


class PrefixRegistry:
    """An LRU cache of saved prefixes by name: the most recently used are in memory, the others on disk."""

    def __init__(self, installation: Installation, max_resident: int) -> None:
        self.installation = installation
        self.paths: dict[str, Path] = {}
        self.max_resident = max_resident
        self.resident: OrderedDict[str, Prefix | SoftPrompt] = OrderedDict()
        self.pinned: set[str] = set()

    @torch.inference_mode(False)
    def get(self, name: str) -> Prefix | SoftPrompt:
        """The prefix of a name, read from disk unless it is in memory; the least recently used ones make room."""
        if name not in self.resident:
            prefix = SavedAdapter(self.paths[name]).build(self.installation)
            distribute(self.installation, prefix)
            prefix.requires_grad_(False).eval()  # it is no part of the model, whose modes do not reach its dropout
            self.resident[name] = prefix
        self.resident.move_to_end(name)
        for other in list(self.resident):
            if len(self.resident) > self.max_resident and other not in self.pinned and other != name:
                del self.resident[other]
        return self.resident[name]

    def forget(self, name: str) -> None:
        """Drop a prefix from memory, and its name; its files stay."""
        del self.paths[name]
        self.resident.pop(name, None)

    @contextmanager
    def pin(self, names: Sequence[Name]) -> Iterator[None]:
        """Keep the registered ones of these prefixes in memory inside the block, once read."""
        wanted = self.pinned | {str(name) for name in names if name in self.paths}
        if len(wanted) > self.max_resident:
            raise fail("names", f"{len(wanted)} prefixes from disk", f"at most max_resident = {self.max_resident}")
        outside, self.pinned = self.pinned, wanted
        try:
            yield
        finally:
            self.pinned = outside


def register(model: Any, dirs: Mapping[str, str | os.PathLike[str]], max_resident: int = 32) -> None:
    """Register saved prefixes by name; each is read when :func:`set_prefix` or :func:`prefix_batch` first needs it.

    For many prefixes on one model: at most ``max_resident`` of them are in memory, and the least recently used is
    dropped first. They are for inference (to train one, attach it with :func:`load`). The model is frozen.

    Args:
        model: a transformers model, with or without attached prefixes.
        dirs: folders as written by :func:`save` or by PEFT, by name, or repositories on the Hugging Face Hub as for
            :func:`load`, each at its main branch. Those are downloaded here, unless they are in the Hub's cache.
        max_resident: how many prefixes may be in memory at a time; a later call's number replaces an earlier one's.

    Raises:
        ValueError: a name is taken or malformed, there is neither a folder nor a repository, ``max_resident`` is below
            1. What a folder holds is checked when it is read.
    """
    if not isinstance(max_resident, int) or max_resident < 1:
        raise fail("max_resident", repr(max_resident), "an int of at least 1")
    fresh = find_installation(model) is None
    installation = get_or_install(model)
    provider = require_not_patched(installation)
    try:
        paths: dict[str, Path] = {}
        for name, given in dirs.items():
            check_name(name)
            if name in provider.names():
                raise fail("dirs", f"{name!r}, which is taken", "new names")
            paths[name] = path = adapter_folder(given, FILES, argument="dirs")
            if not resolve_path(path, CONFIG).is_file():
                raise fail("dirs", f"{path} for {name!r}", f"a folder with {CONFIG}")
    except BaseException:
        if fresh:
            uninstall(installation)
        raise
    installation.freeze()
    if fresh:
        installation.activate(None)
    registry = provider.registry
    if not isinstance(registry, PrefixRegistry):
        registry = provider.registry = PrefixRegistry(installation, max_resident)
    registry.max_resident = max_resident
    registry.paths.update(paths)
