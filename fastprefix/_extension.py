"""The compiled extension ``_C``, or the reason why there is none.

``setup.py`` builds it for one torch and one Python. The package works without it, and builds for the Kernel Hub have
no such file. The environment variable ``FASTPREFIX_NATIVE`` is read once: 0 switches the extension off, a path names
the file to load in its place, which then has to load.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch  # its libraries, which the extension's own names are looked up in, are in the process from here on

from .errors import fail

_FOLDER = Path(__file__).resolve().parent
_NAME = f"{__package__}._C"
# The record that setup.py leaves, and the words that csrc/ops/built_for.h puts into the file.
_REASON = "_C_absent.txt"
_BUILT_FOR = re.compile(rb"fastprefix built for torch ([^\0]+)\0")
_AGAIN = "install fastprefix again with pip install --no-build-isolation"


class Extension(NamedTuple):
    """The module, or None and in one line why it is absent."""

    module: ModuleType | None
    absence: str


@functools.cache
def load() -> Extension:
    """The extension, looked for once in a process."""
    setting = os.environ.get("FASTPREFIX_NATIVE", "")
    if setting == "0":
        return Extension(None, "the compiled extension is switched off by FASTPREFIX_NATIVE=0")
    if setting:
        return Extension(_load_file(Path(setting)), "")
    try:
        return Extension(importlib.import_module("._C", __package__), "")
    except ModuleNotFoundError as error:
        reason = _why_no_file() if error.name == _NAME else str(error)
    except ImportError as error:
        reason = _why_not_loaded(error)
    return Extension(None, f"the compiled extension is absent: {' '.join(reason.split())}")


def _load_file(path: Path) -> ModuleType:
    """The extension from a file that the user names. It is asked for by name, so it loads or raises."""
    if not path.is_file():
        raise fail("FASTPREFIX_NATIVE", path, "0 or the file of a compiled extension")
    spec = importlib.util.spec_from_file_location(_NAME, path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[_NAME] = module
    return module


def _why_no_file() -> str:
    """Python found no file of a name that it would load."""
    others = sorted(path.name for path in _FOLDER.glob("_C.*.so"))
    if others:
        version = ".".join(str(x) for x in sys.version_info[:2])
        return f"it was built for another Python, as {others[0]}, and this is Python {version}: {_AGAIN}"
    try:
        return (_FOLDER / _REASON).read_text()
    except OSError:
        return "it was not built with this copy of the package"


def _why_not_loaded(error: ImportError) -> str:
    """The system's or the file's own refusal. Another torch's file mostly misses a symbol, before it can speak."""
    path = Path(error.path) if error.path else None
    found = _BUILT_FOR.search(path.read_bytes()) if path is not None and path.is_file() else None
    version = found[1].decode() if found else torch.__version__
    if version == torch.__version__ or "built for torch" in str(error):
        return str(error)
    return f"built for torch {version}, found {torch.__version__}: {_AGAIN} ({error})"
