"""What has to be told of a foreign binary: ``fwd.cubin:threads=384,working=256,shared=163840,tile=128x128``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

EXPECTED = "FILE:threads=N[,working=N][,shared=BYTES][,programs=N][,tile=ROWSxKEYS][,kernel=TEXT]"
_FIELDS = {"threads": r"[1-9]\d*", "working": r"[1-9]\d*", "shared": r"\d+", "programs": r"[1-9]\d*"}
_FIELDS |= {"tile": r"[1-9]\d*x[1-9]\d*", "kernel": r"\w+"}


@dataclass(frozen=True)
class BinaryOptions:
    """A binary and how its kernels are launched.

    ``threads`` are those of a block, ``working`` the ones of them that run the loops: fewer where some warps only copy.
    ``shared`` is a block's bytes of shared memory, with those that only the launch asks for; ``programs`` the blocks of
    a launch; ``tile`` the rows and keys of one iteration; ``kernel`` a part of the names of the kernels wanted.
    """

    path: Path
    threads: int
    working: int
    shared: int = 0
    programs: int | None = None
    tile: tuple[int, int] | None = None
    kernel: str = ""


def parse_binary_options(text: str) -> BinaryOptions:
    """Read :data:`EXPECTED`.

    Raises:
        ValueError: it is something else.
    """
    path, _, fields = text.rpartition(":")
    given = dict(field.partition("=")[::2] for field in fields.split(","))
    wrong = [name for name, value in given.items() if not re.fullmatch(_FIELDS.get(name, "(?!)"), value)]
    if not path or wrong or "threads" not in given:
        raise ValueError(f"got {text!r}, expected {EXPECTED}")
    threads, rows, keys = int(given["threads"]), *map(int, given.get("tile", "0x0").split("x"))
    return BinaryOptions(
        Path(path),
        threads,
        int(given.get("working", threads)),
        int(given.get("shared", 0)),
        int(given["programs"]) if "programs" in given else None,
        (rows, keys) if rows else None,
        given.get("kernel", ""),
    )
