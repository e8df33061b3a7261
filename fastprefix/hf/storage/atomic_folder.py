"""Replaces a folder's files together: a reader finds all old files or all new ones, even if a save was killed.

    .fastprefix-save/               the new files, each flushed to disk; without a commit they are ignored
    .fastprefix-save/commit.json    lists the folder's new files: once it exists, the new files are the adapter

After the commit the files are moved to where PEFT reads them. A save that is killed meanwhile is completed by the next
save or load; until then :func:`read_consistently` finds each file at its present path. PEFT, which reads the folder
alone, finds the old files or the new ones: if the key file (``adapter_config.json``) changes, it is removed first and
put in last, so that in between PEFT finds no adapter instead of a mixture.
"""

from __future__ import annotations

import errno
import importlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from fastprefix.errors import fail

# Without fcntl, two saves of one folder are not kept apart.
fcntl: Any = importlib.import_module("fcntl") if os.name == "posix" else None

STAGING, COMMIT = ".fastprefix-save", "commit.json"
_ATTEMPTS = 100  # of a reader that saves interfere with
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS)

T = TypeVar("T")


class Commit(NamedTuple):
    """The content of a folder once a save is complete: names of its files, and names to be deleted."""

    files: tuple[str, ...]  # the key file last
    without: tuple[str, ...]
    hidden: bool = False  # whether the key file is taken out first even where it stays the same


def write_atomically(folder: Path, files: Mapping[str, Callable[[str], Any]], without: Sequence[str] = ()) -> None:
    """Write files, all of them or none.

    Args:
        folder: an existing folder.
        files: for each name a function that writes the file to a given path. The last one is the key file, without
            which a reader of the folder finds nothing.
        without: names of files to delete.

    Raises:
        OSError: the disk is full, for example; an error before the commit leaves the folder as it was.
        ValueError: a folder is in the place of a file.
    """

    def fill(staging: Path) -> Commit:
        for name, write in files.items():
            write(str(staging / name))
        return Commit(tuple(files), tuple(without))

    replace_files(folder, fill)


def replace_files(folder: Path, fill: Callable[[Path], Commit]) -> None:
    """Replace files by those that ``fill`` puts into an empty folder, whose names (with slashes) it returns."""
    staging = folder / STAGING
    with _locked(folder):
        _finish(folder)
        try:
            staging.mkdir()
            commit = fill(staging)
            for name in (*commit.files, *commit.without):
                if (folder / name).is_dir():
                    raise fail(str(folder / name), "a folder", "a file, or nothing, to be replaced")
            for name in commit.files:
                (staging / name).chmod(0o644)
                _flush(staging / name)
            for inner in sorted({(staging / name).parent for name in commit.files} - {staging}):
                _flush(inner)
            part = staging / f"{COMMIT}.part"
            part.write_text(json.dumps(commit._asdict()))
            if (old := _identity(folder / commit.files[-1])) is not None and old[1] > part.stat().st_mtime_ns:
                os.utime(part, ns=(old[1], old[1]))  # for a clock that was set back, see _written_since
            _flush(part)
            _flush(staging)
            os.replace(part, staging / COMMIT)
            _flush(staging)
            _flush(folder)
        except BaseException:
            with suppress(OSError):
                _discard(staging)
            raise
        _finish(folder)


def complete_interrupted_save(folder: Path) -> None:
    """Move a killed save's committed files into place, unless another process does or the folder is read-only."""
    if committed(folder) is not None:
        with suppress(OSError), _locked(folder, wait=False):
            _finish(folder)


def committed(folder: Path) -> Commit | None:
    """The commit of a save whose files are not yet all in place; None where there is none."""
    try:
        data = json.loads((folder / STAGING / COMMIT).read_text())
        found = Commit(tuple(data["files"]), tuple(data["without"]), bool(data.get("hidden")))
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None
    if _written_since(folder, found):
        return None
    return found if found.files and all(map(_is_inside, found.files + found.without)) else None


def _is_inside(name: object) -> bool:
    """Whether this is the name of a file in a folder or below it, and not one of a save's own."""
    if not isinstance(name, str) or "\0" in name or name != Path(name).as_posix():
        return False
    parts = Path(name).parts
    return bool(parts) and not {"..", "/"} & set(parts) and parts[0] not in (COMMIT, STAGING)


def _written_since(folder: Path, commit: Commit) -> bool:
    """Whether another program, such as PEFT, has written a key file into the folder since the commit."""
    if not commit.files or not isinstance(commit.files[-1], str):
        return False
    key, made = _identity(folder / commit.files[-1]), _identity(folder / STAGING / COMMIT)
    # A save's own files are older than its commit, before and after they are moved.
    return key is not None and made is not None and key[1] > made[1]


def read_consistently(folder: Path, names: Iterable[str], read: Callable[[Callable[[str], Path]], T]) -> T:
    """Return ``read(path_of)`` with files of one save, where ``path_of(name)`` is a file's present path.

    ``read`` is called again if a save changed one of the files ``names`` meanwhile.

    Raises:
        ValueError: saves follow one another faster than the files can be read.
    """
    complete_interrupted_save(folder)
    names = tuple(names)
    for attempt in range(_ATTEMPTS):
        before = _stamp(folder, names)
        try:
            result = read(lambda name: resolve_path(folder, name))
        except Exception:
            if _stamp(folder, names) == before:
                raise
        else:
            if _stamp(folder, names) == before:
                return result
        time.sleep(0.001 * attempt)
    raise fail("dir", f"{folder}, which is written again and again", "a folder at rest for the time of reading it")


def resolve_path(folder: Path, name: str) -> Path:
    """The present path of a folder's file: staged by a committed save, or in place."""
    commit = committed(folder)
    staged = folder / STAGING / name
    if commit is not None and (name in commit.without or (name in commit.files and staged.exists())):
        return staged
    return folder / name


def _stamp(folder: Path, names: tuple[str, ...]) -> tuple[Any, ...]:
    """A value that changes when one of the files is replaced, or a commit appears or disappears."""
    paths = [folder / STAGING / COMMIT, *(folder / name for name in names)]
    if committed(folder) is not None:
        paths += [folder / STAGING / name for name in names]
    return tuple(_identity(path) for path in paths)


def _identity(path: Path) -> tuple[int, ...] | None:
    try:
        found = path.stat()
    except (OSError, ValueError):
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def _finish(folder: Path) -> None:
    """Complete a committed save and remove its staging folder; each step may be done already."""
    staging, commit = folder / STAGING, committed(folder)
    if commit is not None:
        *others, key = commit.files
        if (staging / key).exists() and (commit.hidden or not _same(staging / key, folder / key)):
            (folder / key).unlink(missing_ok=True)
            _flush(folder)
        for name in commit.without:
            (folder / name).unlink(missing_ok=True)
            if "/" in name:
                with suppress(OSError):  # other files lie there
                    (folder / name).parent.rmdir()
        for name in (*others, key):
            if name == key:
                _flush(folder)
            if "/" in name and (staging / name).exists():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError):
                os.replace(staging / name, folder / name)
        _flush(folder)
    _discard(staging)


def _same(one: Path, other: Path) -> bool:
    try:
        return one.read_bytes() == other.read_bytes()
    except OSError:
        return False


def _discard(staging: Path) -> None:
    """Remove a staging folder, its commit first, so that a half-removed folder does not count as committed."""
    if staging.is_symlink() or staging.is_file():
        staging.unlink()
    elif staging.exists():
        (staging / COMMIT).unlink(missing_ok=True)
        _flush(staging)
        shutil.rmtree(staging)


def _flush(path: Path) -> None:
    """Flush a file's bytes, or a folder's entries, to disk."""
    is_folder = path.is_dir()
    if is_folder and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)
    try:
        os.fsync(handle)
    except OSError as error:
        if not is_folder or error.errno not in (errno.EINVAL, errno.ENOTSUP):  # not every file system can flush folders
            raise
    finally:
        os.close(handle)


@contextmanager
def _locked(folder: Path, wait: bool = True) -> Iterator[None]:
    """Lock a folder against other saves on this machine inside the block; the lock ends with its process.

    Raises:
        BlockingIOError: ``wait`` is False and another process has the lock.
    """
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        yield
    finally:
        os.close(handle)
