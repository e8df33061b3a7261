"""How the extension is found, and what is said where it is not. Copies of the loader stand for other installs."""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from fastprefix import _extension

PACKAGE = Path(_extension.__file__).parent
SUFFIX = str(sysconfig.get_config_var("EXT_SUFFIX"))
ABSENT = "the compiled extension is absent: "


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package of its own, with a loader and no extension."""
    folder = tmp_path / "another_install"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    for name in ("_extension.py", "errors.py"):
        shutil.copy(PACKAGE / name, folder)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv("FASTPREFIX_NATIVE", raising=False)
    yield folder
    for name in [name for name in sys.modules if name.split(".")[0] == folder.name]:
        del sys.modules[name]


def load(folder: Path) -> tuple[ModuleType | None, str]:
    module, absence = importlib.import_module(f"{folder.name}._extension").load()
    assert absence.count("\n") == 0
    return module, absence


def test_never_built(install: Path) -> None:
    assert load(install) == (None, f"{ABSENT}it was not built with this copy of the package")


def test_the_reason_of_the_install_is_told(install: Path) -> None:
    (install / "_C_absent.txt").write_text("there was no C++ compiler\n")
    assert load(install) == (None, f"{ABSENT}there was no C++ compiler")


def test_another_python(install: Path) -> None:
    (install / "_C.cpython-399-x86_64-linux-gnu.so").write_text("")
    module, absence = load(install)
    assert module is None and "built for another Python, as _C.cpython-399" in absence


def test_a_file_that_does_not_load(install: Path) -> None:
    (install / f"_C{SUFFIX}").write_text("no library")
    module, absence = load(install)
    assert module is None and absence.startswith(ABSENT) and f"_C{SUFFIX}" in absence


def test_a_file_for_another_torch_that_does_not_load(install: Path) -> None:
    """The system refuses a file whose symbols torch no longer has, before the file can say for which torch it is."""
    (install / f"_C{SUFFIX}").write_bytes(b"...fastprefix built for torch 1.0.0+cpu\0...")
    module, absence = load(install)
    assert module is None and f"built for torch 1.0.0+cpu, found {torch.__version__}: install" in absence


def test_switched_off(install: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTPREFIX_NATIVE", "0")
    assert load(install) == (None, "the compiled extension is switched off by FASTPREFIX_NATIVE=0")


def test_a_file_that_was_named_has_to_load(install: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTPREFIX_NATIVE", str(install / "nothing.so"))
    with pytest.raises(ValueError, match=r"FASTPREFIX_NATIVE: got .*nothing\.so, expected 0 or the file"):
        load(install)
    named = install / f"elsewhere{SUFFIX}"
    named.write_text("no library")
    monkeypatch.setenv("FASTPREFIX_NATIVE", str(named))
    with pytest.raises(ImportError, match="elsewhere"):
        load(install)


def test_a_file_that_was_named_loads(native: ModuleType, install: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named = install / f"elsewhere{SUFFIX}"
    shutil.copy(str(native.__file__), named)
    monkeypatch.setenv("FASTPREFIX_NATIVE", str(named))
    module, _ = load(install)
    assert module is not None and module.__file__ == str(named) and module.built_for() == native.built_for()


def test_it_refuses_another_torch(native: ModuleType, install: Path) -> None:
    """In a process of its own: an extension module that has been made once is not made again."""
    shutil.copy(str(native.__file__), install / f"_C{SUFFIX}")
    code = (
        "import torch; torch.__version__ = '0.0.1'\n"
        f"from {install.name} import _extension; module, absence = _extension.load()\n"
        "assert module is None; print(absence)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=install.parent, capture_output=True, text=True)
    again = "install fastprefix again with pip install --no-build-isolation"
    assert done.stdout.strip() == f"{ABSENT}built for torch {native.built_for()}, found 0.0.1: {again}", done.stderr
