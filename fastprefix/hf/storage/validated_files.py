"""Reads adapter files, with errors that name path and field; only regular files of the right format are read."""

from __future__ import annotations

import hashlib
import json
import re
import reprlib
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastprefix.errors import fail
from fastprefix.validation import FLOATS

LARGEST_JSON = 2**20  # bytes


def check_file(path: Path, holder: str, hint: str = "") -> int:
    """A regular file's size; ValueError naming the path for anything else, such as a pipe, which would block."""
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise fail("dir", f"no file {path}{hint}", holder) from None
    except (OSError, ValueError) as error:  # no permission, circular links, an invalid name
        raise fail(str(path), f"no access ({error})", "a file that can be read") from error
    if not stat.S_ISREG(found.st_mode):
        raise fail(str(path), "a folder" if stat.S_ISDIR(found.st_mode) else "no regular file", "a file")
    return found.st_size


def read_json(path: Path, holder: str = "a folder written by fastprefix.save or by PEFT") -> dict[str, Any]:
    """Read a JSON object of a ``holder``; ValueError naming the path where the file does not hold one."""
    size = check_file(path, holder)
    if size > LARGEST_JSON:
        raise fail(str(path), f"{size} bytes", f"a JSON object of at most {LARGEST_JSON}")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise fail(str(path), f"no access ({error})", "a file that can be read") from error
    except (ValueError, RecursionError) as error:
        raise fail(str(path), f"no JSON ({error})", "a JSON object") from error
    if not isinstance(data, dict):
        raise fail(str(path), type(data).__name__, "a JSON object")
    return data


def field(data: dict[str, Any], name: str, kind: type, path: Path, *default: Any) -> Any:
    """A field of the type ``kind``; with a default, the field may be missing or have that value.

    Raises:
        ValueError: the field has another type (a bool is no int); path and field are named.
    """
    value = data.get(name, *default)
    if default and value is default[0]:
        return value
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise fail(f"{path}: {name}", shown(value), " or ".join([kind.__name__, *map(repr, default)]))
    return value


def shown(value: Any) -> str:
    """A value as text for an error message, shortened if it is long."""
    return reprlib.repr(value)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Named tensors of a safetensors file; ValueError naming the path otherwise."""
    hint = ": pickles are not loaded" if path.with_suffix(".bin").exists() else ""
    check_file(path, "safetensors weights", hint)
    try:
        return load_file(path)
    except OSError as error:
        raise fail(str(path), f"no access ({error})", "a file that can be read") from error
    # The other errors include a dtype that this torch does not have.
    except (SafetensorError, AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise fail(str(path), f"no safetensors ({error})", "a safetensors file") from error


def write_tensors(tensors: dict[str, Tensor], path: str) -> None:
    """Write a safetensors file; OSError when the disk is full."""
    try:
        save_file(tensors, path)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), f"{path}: {error}") from error


def write_json(data: dict[str, Any], path: str) -> None:
    """Write a JSON file."""
    Path(path).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def digest(tensors: dict[str, Tensor]) -> str:
    """A hash of adapter weights, by which replaced weights are recognised."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(name.encode())
        found.update(tensors[name].contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def check_tensors(tensors: Mapping[str, Tensor], want: Mapping[str, tuple[str, Sequence[int]]], path: Path) -> None:
    """Check that there are the wanted tensors (dims in words, and sizes) and no others, all of finite floats.

    Raises:
        ValueError: a tensor is missing, unknown or malformed; path and tensor are named.
    """
    for name, (dims, sizes) in want.items():
        if name not in tensors:
            raise fail(f"{path}: {name}", "no such tensor", f"{dims} = {list(sizes)}")
        if list(tensors[name].shape) != list(sizes):
            raise fail(f"{path}: {name}", f"shape {list(tensors[name].shape)}", f"{dims} = {list(sizes)} of this model")
    for name, x in tensors.items():
        if name not in want:
            expected = f"{', '.join(list(want)[:3])}{', ...' if len(want) > 3 else ''} and nothing else"
            raise fail(f"{path}: {shown(name)}", "a tensor that is no part of a prefix", expected)
        if x.dtype not in FLOATS:
            raise fail(f"{path}: {name}", f"dtype {x.dtype}", " or ".join(str(d) for d in FLOATS))
        check_finite(name, x, str(path))


def check_finite(name: str, x: Tensor, path: str) -> None:
    """Raise ValueError for NaN, infinity or a number beyond fp32: one NaN in a prefix makes every output NaN."""
    if x.is_meta:
        raise fail(f"{path}: {name}", "no numbers (it is on the meta device)", "numbers in memory")
    if not bool(x.detach().float().isfinite().all()):
        raise fail(f"{path}: {name}", "nan or infinite numbers", "finite numbers")
