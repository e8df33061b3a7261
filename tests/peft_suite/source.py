"""PEFT's tests: downloaded with pip as the sdist of the installed version, unpacked, never committed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "peft_tests"  # theirs is called `tests`, like ours; both are imported by one process
HUB_NAME = re.compile(r"[\"']((?:hf|peft|trl)-internal-testing/[\w.\-]+)[\"']")


def cache_folder() -> Path:
    """Where the sdist, its tests and the tiny models are kept: ``$FASTPREFIX_PEFT_SUITE`` or ``build/peft_suite``."""
    return Path(os.environ.get("FASTPREFIX_PEFT_SUITE") or ROOT / "build" / "peft_suite").absolute()


def download(folder: Path) -> Path:
    """The sdist of the PEFT that is installed; an earlier download is taken as it is."""
    wanted = f"peft-{version('peft')}"
    archive = folder / f"{wanted}.tar.gz"
    if not archive.exists():
        folder.mkdir(parents=True, exist_ok=True)
        # Metadata is built with the setuptools that is installed: a build environment would be one more download.
        options = ["--quiet", "--no-deps", "--no-binary", ":all:", "--no-build-isolation", "--dest", str(folder)]
        command = [sys.executable, "-m", "pip", "download", *options, wanted.replace("-", "==")]
        if subprocess.run(command).returncode:
            raise SystemExit(f"{wanted}: pip could not download its sdist, which holds the tests")
    return archive


def unpack(archive: Path) -> Path:
    """The folder that holds the package ``peft_tests``."""
    home = archive.parent / archive.name.removesuffix(".tar.gz")
    if (home / PACKAGE / "__init__.py").exists():
        return home
    shutil.rmtree(home, ignore_errors=True)
    inside = f"{home.name}/tests/"
    with tarfile.open(archive) as tar:
        members = [member for member in tar.getmembers() if member.name.startswith(inside) and member.isfile()]
        for member in members:
            member.name = f"{PACKAGE}/{member.name.removeprefix(inside)}"
        tar.extractall(home, members=members, filter="data")
    (home / PACKAGE / "__init__.py").touch()  # the sdist leaves it out; last, for it says that all is there
    return home


def hub_names(home: Path, files: tuple[str, ...]) -> list[str]:
    """The names on the hub that these test files mention."""
    found = {name for file in files for name in HUB_NAME.findall((home / PACKAGE / file).read_text())}
    return sorted(found)
