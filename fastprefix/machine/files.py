"""The folder for what is kept between runs, and files that are whole at every moment."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path


def cache_dir() -> Path:
    """The folder for what is kept between runs: ``$FASTPREFIX_CACHE``, else ``$XDG_CACHE_HOME/fastprefix``, else
    ``~/.cache/fastprefix``. It need not exist yet."""
    if own := os.environ.get("FASTPREFIX_CACHE"):
        return Path(own).expanduser()
    xdg = os.environ.get("XDG_CACHE_HOME")
    return (Path(xdg).expanduser() if xdg else Path.home() / ".cache") / "fastprefix"


def slug(name: str) -> str:
    """A name as a file or folder is called: ``NVIDIA H100 80GB HBM3`` -> ``nvidia-h100-80gb-hbm3``."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def write_atomically(path: Path, text: str) -> None:
    """Write to a temporary file, then rename it: a reader finds a whole file, also after a kill."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
