"""How the compilers are found and what is said where they are not; nothing here is compiled."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fastprefix.cuda_library import build
from fastprefix.cuda_library.build import BuildError, Nvcc, Sources
from tests.cuda.libraries import OPERATORS, TORCH, sources

KERNEL = Path(__file__).with_name("fill_decode.cu")


def script(path: Path, text: str) -> Path:
    """An executable that stands for a compiler."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def toolkit(root: Path, version: str = "12.8.61", rest: str = "exit 0") -> Path:
    return script(root / "bin" / "nvcc", f'[ "$1" = --version ] && echo "Build V{version}" && exit\n{rest}')


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without a toolkit."""
    for name in ("CUDA_HOME", "CUDA_PATH", "CXX", build.ARCHITECTURES, "MAX_JOBS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    monkeypatch.setattr(build, "USUAL", tmp_path / "usual")
    return tmp_path


def test_the_builder_needs_nothing_but_python() -> None:
    """setup.py loads it by its path, before torch is there."""
    code = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('b', {build.__file__!r})\n"
        "spec.loader.exec_module(importlib.util.module_from_spec(spec))\n"
        "print([name for name in ('torch', 'fastprefix') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_the_operators_compile_with_the_oldest_torch() -> None:
    """By a name that is missed there: the macro for torch's codes is called differently in 2.11 and in 2.13."""
    for path in Sources(KERNEL.parent, OPERATORS).files():
        assert path.parent != OPERATORS or "TORCH_ERROR_CODE_CHECK" not in path.read_text(), path


def test_no_nvcc(nowhere: Path) -> None:
    with pytest.raises(BuildError, match=r"there is no nvcc: none on PATH or in .*, and CUDA_HOME names no toolkit"):
        build.find_nvcc()


def test_where_it_is_looked_for(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is named, then what is on PATH, then the usual places: the machine's own choice of them, or the newest."""
    old = toolkit(nowhere / "usual" / "cuda-9.2")
    assert build.find_nvcc() == Nvcc(old, "12.8.61")
    new = toolkit(nowhere / "usual" / "cuda-13.0", "13.0.88")
    assert build.find_nvcc() == Nvcc(new, "13.0.88")
    chosen = toolkit(nowhere / "usual" / "cuda")
    assert build.find_nvcc().path == chosen
    on_path = script(nowhere / "path" / "nvcc", f'exec {new} "$@"')
    assert build.find_nvcc() == Nvcc(on_path, "13.0.88")
    for variable in ("CUDA_PATH", "CUDA_HOME"):
        named = toolkit(
            nowhere / variable, variable.removeprefix("CUDA_").replace("PATH", "1.0").replace("HOME", "2.0")
        )
        monkeypatch.setenv(variable, str(nowhere / variable))
        assert build.find_nvcc().path == named
    monkeypatch.setenv("CUDA_HOME", str(nowhere))
    with pytest.raises(BuildError, match=f"CUDA_HOME: got {nowhere}, expected a CUDA toolkit, which has bin/nvcc"):
        build.find_nvcc()


def test_one_that_does_not_run(nowhere: Path) -> None:
    script(nowhere / "path" / "nvcc", "echo something; exit 3")
    with pytest.raises(BuildError, match="nvcc failed: something"):
        build.find_nvcc()
    script(nowhere / "path" / "nvcc", "echo hello")
    with pytest.raises(BuildError, match="nvcc --version names no version"):
        build.find_nvcc()


def test_architectures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(build.ARCHITECTURES, raising=False)
    assert build.architectures() == [
        "-gencode", "arch=compute_80,code=[sm_80,compute_80]", "-gencode", "arch=compute_90a,code=sm_90a",
        "-DFASTPREFIX_HOPPER",
    ]  # fmt: skip
    monkeypatch.setenv(build.ARCHITECTURES, "8.6, 10.0f+PTX")
    assert build.architectures()[1::2] == [
        "arch=compute_86,code=sm_86",
        "arch=compute_100f,code=[sm_100f,compute_100f]",
    ]
    for wrong in ("80", "7.5", "Hopper", "9.0a;;x"):
        monkeypatch.setenv(build.ARCHITECTURES, wrong)
        with pytest.raises(BuildError, match=f"{build.ARCHITECTURES}: got '{wrong}', expected numbers from 8.0"):
            build.architectures()


def test_hopper_is_asked_for_by_its_own_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Code for plain 9.0 would run there, and its forward could only end the launch with an error."""
    monkeypatch.setenv(build.ARCHITECTURES, "8.0;9.0")
    with pytest.raises(BuildError, match=r"got '8\.0;9\.0', expected 9\.0a"):
        build.architectures()


def test_sources(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="no sources"):
        build.find_sources(tmp_path / "package")
    checkout = Sources(tmp_path / "kernels" / "cuda", tmp_path / "csrc" / "cuda")
    wheel = Sources(tmp_path / "package" / "_cuda", tmp_path / "package" / "_cuda_operators")
    for found in (checkout, wheel):
        for folder, name in zip(found, ("a.cu", "a.cpp")):
            folder.mkdir(parents=True)
            (folder / name).write_text(name)
        assert build.find_sources(tmp_path / "package") == found
    assert checkout.digest() == wheel.digest(), (
        "an install builds from one, and the installed package looks for the other"
    )


def test_another_source_option_or_compiler_is_another_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(build.ARCHITECTURES, raising=False)
    monkeypatch.delenv("CXX", raising=False)
    files, nvcc = sources(tmp_path / "k", KERNEL), Nvcc(Path("nvcc"), "13.0.88")
    keys = [build.key(files, nvcc), build.key(files, Nvcc(Path("nvcc"), "13.1.0"))]
    assert keys[0] == build.key(files, Nvcc(Path("/elsewhere/nvcc"), "13.0.88"))
    for name in ("attention_call.h", KERNEL.name):
        (files.kernels / name).write_text("// changed\n" + (files.kernels / name).read_text())
        keys.append(build.key(files, nvcc))
    (files.kernels / "another.cuh").write_text("")
    keys.append(build.key(files, nvcc))
    for variable, value in ((build.ARCHITECTURES, "9.0a"), ("CXX", "clang++")):
        monkeypatch.setenv(variable, value)
        keys.append(build.key(files, nvcc))
    assert len(set(keys)) == len(keys) == 7


def test_a_compiler_that_fails(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first line that speaks of an error, and all that was said; nothing is left behind."""
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    told = "echo note: a long tale\necho 'a.cu(3): error: no such thing'\necho more"
    nvcc = Nvcc(toolkit(nowhere / "cuda", rest=f"{told}\nexit 2"), "12.8.61")
    monkeypatch.setenv("CXX", "true")
    out = nowhere / "out" / "lib.so"
    with pytest.raises(BuildError, match=r"^nvcc failed: a\.cu\(3\): error: no such thing$") as failure:
        build.build(out, sources(nowhere / "k", KERNEL), nvcc, TORCH)
    assert "note: a long tale" in failure.value.output and "-gencode" in failure.value.output
    assert list(out.parent.iterdir()) == []
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    with pytest.raises(BuildError, match=r"there is no C\+\+ compiler: no-such-compiler was not found"):
        build.build(out, Sources(nowhere / "k", OPERATORS), nvcc, TORCH)


def test_a_folder_that_cannot_be_written(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    (nowhere / "file").write_text("")
    with pytest.raises(BuildError, match="cannot be written"):
        build.build(nowhere / "file" / "lib.so", sources(nowhere / "k", KERNEL), Nvcc(Path("nvcc"), "1"), TORCH)


def test_which_compilers_are_asked(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The user's choice reaches nvcc too, unless it was told of another."""
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    log = nowhere / "log"
    record = f'echo "$0 $@" >> {log}; while [ "$1" != -o ]; do shift; done; touch "$2"'
    nvcc = Nvcc(toolkit(nowhere / "cuda", rest=record), "12.8.61")
    host = script(nowhere / "host", record)
    monkeypatch.setenv("CXX", f"env {host}")
    monkeypatch.delenv("NVCC_CCBIN", raising=False)
    build.build(nowhere / "lib.so", sources(nowhere / "k", KERNEL), nvcc, TORCH, ["ONE", "TWO=2"])
    *compiled, link = log.read_text().splitlines()
    of_nvcc = next(line for line in compiled if line.startswith(str(nvcc.path)))
    of_host = next(line for line in compiled if line.startswith(str(host)))
    assert f"-ccbin {host}" in of_nvcc and f"-ccbin {host}" in link and KERNEL.name in of_nvcc
    assert "-DONE -DTWO=2" in of_host and build.TARGET in of_host and "-DONE" not in of_nvcc
    assert str(TORCH) not in of_nvcc, "torch's headers cost nvcc ten seconds"
    assert "-ltorch_cpu" in link and not any(name in link for name in ("-lcuda", "-lc10", "-ltorch_python"))
    assert (nowhere / "lib.so").is_file()
    log.unlink()
    monkeypatch.setenv("NVCC_CCBIN", "other")
    build.build(nowhere / "lib.so", sources(nowhere / "k", KERNEL), nvcc, TORCH)
    assert "-ccbin" not in log.read_text()
