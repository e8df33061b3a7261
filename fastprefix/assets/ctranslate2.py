"""Reads CTranslate2's ``model.bin`` without CTranslate2."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastprefix.errors import fail

VERSION = 6  # version of the file format; a model's specification has its own version number
_DTYPES = (torch.float32, torch.int8, torch.int16, torch.int32, torch.float16, torch.bfloat16)


def read(path: Path, specification: str) -> dict[str, Tensor]:
    """Read the variables by name, in their stored dtypes; aliases are left out.

    A file holds, in little-endian: version, name and revision of the specification, number of variables; then for each
    variable its name, rank, sizes, dtype, number of bytes, and bytes. A text is stored as its length including a
    closing NUL, then its bytes.

    Raises:
        ValueError: the file has another version of the format, or is not a model of this specification.
    """
    with open(path, "rb") as file:

        def number(code: str) -> Any:
            return struct.unpack(f"<{code}", file.read(struct.calcsize(code)))[0]

        def text() -> str:
            return file.read(number("H"))[:-1].decode()

        if (version := number("I")) != VERSION:
            raise fail(str(path), f"version {version}", f"CTranslate2's format {VERSION}")
        if (name := text()) != specification:
            raise fail(str(path), name, specification)
        number("I")  # the specification's revision
        variables = {}
        for _ in range(number("I")):
            name = text()
            shape = [number("I") for _ in range(number("B"))]
            dtype = _DTYPES[number("B")]
            variables[name] = torch.frombuffer(bytearray(file.read(number("I"))), dtype=dtype).reshape(shape)
    return variables
