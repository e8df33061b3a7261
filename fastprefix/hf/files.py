"""Adapter files: replaced whole or not at all, and read with errors that name path and field."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fastprefix.validation import fail


def replace(path: Path, write: Callable[[str], Any]) -> None:
    """Write aside, then rename: an interruption leaves the old file whole."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        write(temporary)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; ValueError naming the path when there is none."""
    try:
        data = json.loads(path.read_text())
    except FileNotFoundError:
        raise fail("dir", f"no file {path}", "a folder written by fastprefix.save or by PEFT") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise fail(str(path), f"no JSON ({error})", "a JSON object") from error
    if not isinstance(data, dict):
        raise fail(str(path), type(data).__name__, "a JSON object")
    return data


def field(data: dict[str, Any], name: str, kind: type, path: Path) -> Any:
    """A field of the right type; ValueError naming path and field otherwise."""
    if not isinstance(data.get(name), kind):
        raise fail(f"{path}: {name}", repr(data.get(name)), f"{kind.__name__}")
    return data[name]


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Named tensors of a safetensors file; ValueError naming the path otherwise."""
    try:
        return load_file(path)
    except FileNotFoundError:
        hint = ": pickles are not loaded" if path.with_suffix(".bin").exists() else ""
        raise fail("dir", f"no file {path}{hint}", "safetensors weights") from None
    except SafetensorError as error:
        raise fail(str(path), f"no safetensors ({error})", "a safetensors file") from error
