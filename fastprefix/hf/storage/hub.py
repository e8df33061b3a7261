"""Finds the folder of a saved adapter: one that is given, or a repository's on the Hugging Face Hub or in its cache."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
)
from huggingface_hub.utils import validate_repo_id

from fastprefix.errors import fail

EXPECTED = "a folder, or the name of a repository on the Hub or in its cache: there is neither"


def adapter_folder(
    given: str | os.PathLike[str], files: Sequence[str], revision: str | None = None, argument: str = "dir"
) -> Path:
    """The folder that a user's path or repository name means; whatever exists at the path comes first.

    Args:
        given: a path, or ``namespace/name`` of a repository.
        files: names of the files to download from a repository; those in the Hub's cache are not downloaded again.
        revision: a branch, tag or commit of the repository; None for its main branch.
        argument: name of the user's argument, for errors.

    Returns:
        The path, or the folder of the repository's snapshot in the cache. A path that is no repository's name is
        returned whether it exists or not: who reads it says which file is missing.

    Raises:
        ValueError: there is no such repository or revision, or it cannot be reached and is not in the cache; a revision
            comes with a path.
    """
    path = Path(given)
    if not is_repository_name(given) or os.path.lexists(path):
        if revision is not None:
            expected = "None with a folder: revisions are a repository's"
            raise fail("revision", f"{revision!r} with {os.fspath(given)!r}", expected)
        return path
    try:
        return Path(snapshot_download(str(given), revision=revision, allow_patterns=list(files)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        at = "" if revision is None else f" at revision {revision!r}"
        reason = (str(error).strip().splitlines() or [""])[0]
        raise fail(argument, f"{given!r}{at} ({type(error).__name__}: {reason})", EXPECTED) from error


def is_repository_name(given: object) -> bool:
    """Whether this is a string of the form ``namespace/name``, as the names of adapters' repositories are."""
    if not isinstance(given, str) or given.count("/") != 1:
        return False
    try:
        validate_repo_id(given)
    except HFValidationError:
        return False
    return True
