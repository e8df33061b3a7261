"""Where tables are kept: the cache folder, a file that the user names, or this process alone."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from enum import Enum
from pathlib import Path
from typing import Any

import torch

from ..backends import native
from ..errors import fail
from ..machine.files import cache_dir, slug, write_atomically
from .identity import digest, identity
from .table import Table

VARIABLE = "FASTPREFIX_VERIFY"


class Policy(Enum):
    """What ``$FASTPREFIX_VERIFY`` says: trust nothing to be checked, check at first use, or read one file alone."""

    OFF = "off"
    FIRST_USE = "first-use"
    FILE = "file"


def policy() -> Policy:
    """The policy of this process."""
    match os.environ.get(VARIABLE, ""):
        case "off":
            return Policy.OFF
        case "" | "first-use":
            return Policy.FIRST_USE
    return Policy.FILE


# What was drawn from tables. It stands while more becomes known, so that a call that is made again gives the same bits,
# until something turns out to be wrong or the user verifies.
decisions: dict[tuple[object, ...], Any] = {}

_tables: dict[str, Table] = {}  # by digest of the identity
_lock = threading.RLock()
_unwritable: set[Path | None] = set()


def table(place: torch.device) -> Table:
    """What is known of a device; the same object for all devices of one kind, read from its file once.

    Raises:
        ValueError: ``$FASTPREFIX_VERIFY`` names a file that is not there.
    """
    return open_table(place)


def open_table(place: torch.device, need_file: bool = True) -> Table:
    """As :func:`table`; without ``need_file``, the file that ``$FASTPREFIX_VERIFY`` names need not be there yet."""
    mine = identity(place)
    with _lock:
        found = _tables.get(digest(mine))
        if found is None:
            file = path(place)
            stored = _named(mine, need_file) if policy() is Policy.FILE else file and read(file, mine)
            found = stored or Table(mine)
            _tables[digest(mine)] = found
        return found


def forget() -> None:
    """Drop what this process knows, so that files are read again."""
    with _lock:
        _tables.clear()
        forget_decisions()


def forget_decisions() -> None:
    """Drop what was drawn from tables."""
    decisions.clear()
    native.forget()


def path(place: torch.device) -> Path | None:
    """The file of a device in the cache folder; None where there can be no such folder."""
    mine = identity(place)
    try:
        return cache_dir() / "verified" / f"{slug(mine['device'])}-{digest(mine)}.json"
    except RuntimeError:  # a user without a home
        return None


def read(file: Path, mine: dict[str, str]) -> Table | None:
    """The table in a file; None where there is none, or it is damaged, older, or of another device or version."""
    try:
        found = Table.from_json(file.read_text())
    except (OSError, ValueError):
        return None
    return found if found.identity == mine else None


def _named(mine: dict[str, str], need_file: bool) -> Table | None:
    file = Path(os.environ[VARIABLE]).expanduser()
    if not file.is_file():
        if not need_file:
            return None
        raise fail(VARIABLE, repr(str(file)), "'off', 'first-use' or a file that `fastprefix verify --out` wrote")
    found = read(file, mine)
    if found is None and need_file:
        tell(f"{VARIABLE}={file}: nothing in it holds for {mine['device']} with this driver, torch and Triton")
    return found


def reload(place: torch.device) -> None:
    """Take over what other processes have written meanwhile."""
    file = path(place)
    found = file and read(file, identity(place))
    if found:
        with _lock:
            mine = table(place)
            if found.bad() - mine.bad():
                forget_decisions()
            mine.update(found)


def add(place: torch.device, found: Table, out: Path | None = None, decide_again: bool = False) -> Path | None:
    """Remember new verdicts: in this process, and in the file ``out`` or the device's own.

    Returns:
        The file; None where it cannot be written, which a line on stderr says once.

    Raises:
        OSError: ``out`` cannot be written.
    """
    with _lock:
        mine = table(place)
        if decide_again or found.bad() - mine.bad():
            forget_decisions()
        mine.update(found)
        file = path(place) if out is None else out
        stored = Table(found.identity)
        if out is None and file is not None and (before := read(file, found.identity)) is not None:
            stored.update(before)
        stored.update(found)
    try:
        if file is None:
            raise OSError("there is no home folder")
        write_atomically(file, stored.to_json())
    except OSError as error:
        if out is not None:
            raise
        if file not in _unwritable:
            _unwritable.add(file)
            where, why = file or "the cache folder", error.strerror or error
            tell(f"{where} cannot be written ({why}): the verdicts last for this process")
        return None
    return file


@contextmanager
def alone(place: torch.device, patience: float) -> Iterator[bool]:
    """Hold the lock of a device's file, which other processes hold while they verify it; it ends with its holder.

    Yields:
        Whether this process had to wait; without the lock, after ``patience`` seconds or where no file can be
        written, it goes on alone.
    """
    from filelock import FileLock, Timeout

    file = path(place)
    if file is None:
        yield False
        return
    waited = False
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        held = FileLock(file.with_suffix(".lock"))
        try:
            held.acquire(timeout=0)
        except Timeout:
            waited = True
            held.acquire(timeout=patience)
    except (Timeout, OSError, NotImplementedError):  # the last on file systems without locks
        yield waited
        return
    try:
        yield waited
    finally:
        held.release()


def tell(text: str) -> None:
    """One line on stderr."""
    say(f"fastprefix: {text}\n")


def say(text: str) -> None:
    """Text on stderr, where there is one."""
    if sys.stderr is not None:
        with suppress(OSError, ValueError):  # closed, or its reader is gone
            sys.stderr.write(text)
            sys.stderr.flush()
