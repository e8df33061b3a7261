"""Which library is loaded, when one is built, and the reasons in one line where there is none."""

from __future__ import annotations

import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fastprefix import explain, prefix_attention
from fastprefix.backends import cuda
from fastprefix.cuda_library import build, library
from fastprefix.cuda_library.build import BuildError, Nvcc, Sources
from fastprefix.dispatch import UnsupportedError
from fastprefix.verification import run, store
from fastprefix.verification.identity import identity
from fastprefix.verification.table import Table
from tests.support.operator_calls import make_call

ABSENT = "the CUDA library is absent: "
KERNEL = Path(__file__).with_name("fill_decode.cu")


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An installed package of its own with sources, a torch with CUDA, an nvcc, and nothing built."""
    package = tmp_path / "package"
    for folder, name in ((package / "_cuda", "a.cu"), (package / "_cuda_operators", "a.cpp")):
        folder.mkdir(parents=True)
        (folder / name).write_text("")
    monkeypatch.delenv(library.VARIABLE, raising=False)
    monkeypatch.delenv(build.ARCHITECTURES, raising=False)
    monkeypatch.setenv("FASTPREFIX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(library, "PACKAGE", package)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(build, "find_nvcc", lambda: Nvcc(Path("nvcc"), "13.0.88"))
    monkeypatch.setattr(library, "_loaded", lambda path: library.Library(types.SimpleNamespace(), "", path))
    library.forget()
    yield package
    library.forget()


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were asked for; a compiler writes them at once."""
    asked: list[Path] = []

    def write(out: Path, *rest: object) -> None:
        asked.append(out)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text("a library")

    monkeypatch.setattr(build, "build", write)
    return asked


def absence(build: bool = False) -> str:
    found = library.load(build)
    assert found.ops is None and found.path is None and "\n" not in found.absence
    return found.absence


def test_a_torch_without_cuda(install: Path, monkeypatch: pytest.MonkeyPatch, built: list[Path]) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    assert absence(build=True) == f"{ABSENT}this torch, {torch.__version__}, has no CUDA"
    library.forget()
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert absence() == f"{ABSENT}this torch, {torch.__version__}, is for AMD's devices"
    assert not built


def test_switched_off(install: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(library.VARIABLE, "0")
    assert absence(build=True) == "the CUDA library is switched off by FASTPREFIX_CUDA=0"


def test_a_file_that_was_named_has_to_load(install: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(library.VARIABLE, str(install / "nothing.so"))
    with pytest.raises(ValueError, match=r"FASTPREFIX_CUDA: got .*nothing\.so, expected 0 or the file of a library"):
        library.load()
    (install / "nothing.so").write_text("no library")
    assert library.load().path == install / "nothing.so"
    library.forget()
    monkeypatch.undo()
    monkeypatch.setenv(library.VARIABLE, str(install / "nothing.so"))
    with pytest.raises(OSError, match=r"nothing\.so"):
        library.load()


def test_the_reason_of_the_install_and_what_helps(install: Path, built: list[Path]) -> None:
    helps = "; `fastprefix verify`, or backend='cuda' by name, builds it where there is nvcc"
    assert absence() == f"{ABSENT}it was not built with this copy of the package{helps}"
    library.forget()
    (install / library.RECORD).write_text("there was no nvcc\n")
    assert absence() == f"{ABSENT}there was no nvcc{helps}"
    assert not built


def test_no_sources(install: Path) -> None:
    """As in a package for the Kernel Hub."""
    (install / "_cuda" / "a.cu").unlink()
    assert absence(build=True) == f"{ABSENT}this copy of the package has no sources of it"


def test_it_is_built_once_when_it_is_asked_for(
    install: Path, built: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cuda.routes("cuda") == () and not built
    cuda.prepare(torch.device("cpu"))
    assert not built
    cuda.prepare(torch.device("cuda:0"))
    (path,) = built
    assert path.parent == tmp_path / "cache" / "cuda" and library.load().path == path
    assert cuda.routes("cuda") == cuda.ROUTES and cuda.routes("cpu") == ()
    assert "building the CUDA kernels with nvcc 13.0.88, once ... " in capsys.readouterr().err
    library.forget()
    assert library.load().path == path, "another process finds it without building"
    (install / "_cuda" / "a.cu").write_text("// changed")
    library.forget()
    assert "it was not built" in absence()
    cuda.prepare(torch.device("cuda:0"))
    assert len(set(built)) == 2


def test_an_installed_one_is_found_first(install: Path, built: list[Path]) -> None:
    name = build.installed_name(Sources(install / "_cuda", install / "_cuda_operators"))
    (install / name).write_text("a library")
    assert library.load(build=True).path == install / name and not built
    library.forget()
    (install / "_cuda" / "a.cu").write_text("// changed, as in a checkout")
    assert "it was not built" in absence()


def test_a_compiler_that_fails_is_asked_once(install: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[Path] = []

    def refuse(out: Path, *rest: object) -> None:
        asked.append(out)
        out.parent.mkdir(parents=True, exist_ok=True)
        raise BuildError("nvcc failed: a.cu(3): error", "all that it said")

    monkeypatch.setattr(build, "build", refuse)
    for _ in range(3):
        told = absence(build=True)
    (log,) = (tmp_path / "cache" / "cuda").glob("*.log")
    assert told == f"{ABSENT}nvcc failed: a.cu(3): error ({log})" and log.read_text() == "all that it said"
    assert absence() == told and len(asked) == 1


def test_no_nvcc_and_no_folder(install: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def missing() -> Nvcc:
        raise BuildError("there is no nvcc")

    monkeypatch.setattr(build, "find_nvcc", missing)
    assert absence(build=True) == f"{ABSENT}there is no nvcc"
    library.forget()
    monkeypatch.undo()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASTPREFIX_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(library, "PACKAGE", install)
    monkeypatch.setattr(build, "find_nvcc", lambda: Nvcc(Path("nvcc"), "13.0.88"))
    assert "Not a directory" in absence(build=True)


def test_a_file_that_does_not_load(install: Path, monkeypatch: pytest.MonkeyPatch, built: list[Path]) -> None:
    def load(path: Path) -> None:
        raise OSError(f"{path}: invalid\nELF header")

    monkeypatch.setattr(library, "_loaded", load)
    assert absence(build=True).endswith(": invalid ELF header")


def test_verdicts_hold_for_what_was_compiled(install: Path, built: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from fastprefix.machine import device

    cpu = torch.device("cpu")
    assert identity(cpu)["cuda"] == ""
    for name in ("name", "capability", "driver"):
        monkeypatch.setattr(device, name, lambda place: "a stand-in")
    monkeypatch.setattr(device, "kind", lambda place: "cuda")
    assert identity(cpu)["cuda"] == "none"
    library.load(build=True)
    assert identity(cpu)["cuda"] == library.digest(built[0]) != "none"


def test_verify_and_a_call_by_name_ask_for_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """``verify`` before it opens a table, which holds for the library; ``auto`` and ``explain`` never."""
    cpu, asked, opened = torch.device("cpu"), [], []
    monkeypatch.setenv("FASTPREFIX_CACHE", str(tmp_path))
    monkeypatch.setattr(cuda, "prepare", asked.append)
    monkeypatch.setattr(store, "open_table", lambda *rest, **more: opened.append(list(asked)) or Table({}))
    monkeypatch.setattr(run, "examine", lambda *rest: (Table(identity(cpu)), 0))
    monkeypatch.setattr(store, "add", lambda *rest, **more: None)
    run.verify("cpu", budget=1.0)
    assert asked == [cpu] and opened[0] == [cpu]
    asked.clear()
    monkeypatch.undo()
    monkeypatch.setattr(cuda, "prepare", asked.append)
    leaves = make_call(dtype=torch.bfloat16).leaves
    explain(**leaves)
    prefix_attention(**leaves)
    assert asked == []
    with pytest.raises(UnsupportedError):
        prefix_attention(**leaves, backend="cuda")
    assert set(asked) == {cpu}
