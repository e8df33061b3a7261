"""Compiles the library of CUDA kernels: nvcc the kernels, a C++ compiler the operators around them.

The standard library alone, and no other module of the package: ``setup.py`` loads this file by its path. torch's own
builder of extensions is not used, as it builds for one Python and links libraries that only a torch with CUDA has.

Environment variables:

- ``CUDA_HOME`` or ``CUDA_PATH``: the toolkit, else the nvcc on ``PATH``, else ``/usr/local/cuda*``;
- ``FASTPREFIX_CUDA_ARCH_LIST``: architectures in torch's spelling, ``8.0+PTX;9.0a`` without it;
- ``CXX`` and ``MAX_JOBS``: the host's compiler and how many compilers may run at once, as for torch's extensions.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

NAME = "libfastprefix_cuda"
ARCHITECTURES = "FASTPREFIX_CUDA_ARCH_LIST"
# A cubin of 8.0 serves 8.6 and 8.9 too, and one of 9.0a has Hopper's own instructions. PTX of 8.0 is what the driver of
# any later device compiles for itself; PTX of 9.0a would serve no other device.
DEFAULT_ARCHITECTURES = "8.0+PTX;9.0a"
# torch 2.11, the oldest that the package takes: what is built with a newer one's headers then runs on it too.
TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"
# Nothing but the operators' registration is seen from outside, and torch's own CUDA runtime is not mistaken for ours.
HOST = ["-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", TARGET]
DEVICE = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
LINK = ["-shared", "-cudart", "static", "-Xlinker", "--exclude-libs=ALL,-z,defs", "-ltorch_cpu", "-ldl"]
USUAL = Path("/usr/local")
LAST_WORDS = 300  # characters of a compiler's complaint in a reason


class BuildError(Exception):
    """Why there is no library, in one line.

    Attributes:
        output: all that a compiler said.
    """

    def __init__(self, reason: str, output: str = "") -> None:
        super().__init__(" ".join(reason.split()))
        self.output = output


class Sources(NamedTuple):
    """Folders: of kernels with their headers, and of the operators around them."""

    kernels: Path
    operators: Path

    def files(self) -> list[Path]:
        """All that is compiled or included, in an order that is the same in a checkout and in an installed package."""
        ends = (".cu", ".cuh", ".h", ".cpp")
        return [x for folder in self for x in sorted(folder.rglob("*")) if x.suffix in ends]

    def digest(self, *others: str) -> str:
        """A short name of what the files say, and of other texts."""
        found = hashlib.sha256("\0".join(others).encode())
        for path in self.files():
            found.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
        return found.hexdigest()[:16]


class Nvcc(NamedTuple):
    """A CUDA compiler."""

    path: Path
    version: str  # 13.0.88


def find_sources(package: Path) -> Sources:
    """The sources of an installed package, or of the checkout that it lies in.

    Raises:
        BuildError: this copy of the package has none.
    """
    for found in (
        Sources(package / "_cuda", package / "_cuda_operators"),
        Sources(package.parent / "kernels" / "cuda", package.parent / "csrc" / "cuda"),
    ):
        if found.operators.is_dir() and any(found.kernels.glob("*.cu")):
            return found
    raise BuildError("this copy of the package has no sources of it")


def installed_name(sources: Sources) -> str:
    """The file that an install puts into the package. An older one, of other sources, has another name."""
    return f"{NAME}.{sources.digest()}.so"


def find_nvcc() -> Nvcc:
    """The CUDA compiler.

    Raises:
        BuildError: there is none, or it does not run.
    """
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if root := os.environ.get(variable):
            path = Path(root, "bin", "nvcc")
            if not path.is_file():
                raise BuildError(f"{variable}: got {root}, expected a CUDA toolkit, which has bin/nvcc")
            return Nvcc(path, _version(path))
    # What is on PATH may be a script that starts another nvcc. It is asked to link too, so where that one lies, and the
    # runtime's library with it, need not be known.
    on_path = shutil.which("nvcc")
    found = [Path(on_path)] if on_path else sorted(USUAL.glob("cuda*/bin/nvcc"), key=_numbers, reverse=True)
    if not found:
        raise BuildError(f"there is no nvcc: none on PATH or in {USUAL}/cuda, and CUDA_HOME names no toolkit")
    return Nvcc(found[0], _version(found[0]))


def _numbers(path: Path) -> list[int]:
    """The version in ``/usr/local/cuda-13.0``, to sort by; plain ``/usr/local/cuda`` is the machine's own choice."""
    return [int(x) for x in re.findall(r"\d+", path.parts[-3])] or [10**6]


def _version(nvcc: Path) -> str:
    words = _run([str(nvcc), "--version"])
    found = re.search(r"\bV(\d[\d.]*)", words)
    if found is None:
        raise BuildError(f"{nvcc} --version names no version", words)
    return found[1]


def architectures() -> list[str]:
    """nvcc's options for the devices to compile for.

    Raises:
        BuildError: the environment variable has another form.
    """
    text = os.environ.get(ARCHITECTURES) or DEFAULT_ARCHITECTURES
    found = []
    for word in re.split(r"[;,\s]+", text.strip()):
        match = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", word)
        if match is None or int(match[1]) < 8:
            told = f"numbers from 8.0, as in {DEFAULT_ARCHITECTURES!r}"
            raise BuildError(f"{ARCHITECTURES}: got {text!r}, expected {told}")
        if match[2] == "0" and match[1] == "9":
            raise BuildError(f"{ARCHITECTURES}: got {text!r}, expected 9.0a, which has Hopper's instructions")
        number = match[1] + match[2]
        codes = f"[sm_{number},compute_{number}]" if match[3] else f"sm_{number}"
        found += ["-gencode", f"arch=compute_{number},code={codes}"]
    # Without code of Hopper's own, the kernels for all other devices run there too.
    return [*found, "-DFASTPREFIX_HOPPER"] if any("sm_90a" in x for x in found) else found


def key(sources: Sources, nvcc: Nvcc) -> str:
    """A short name of what is built: other sources, options, compilers and processors give another."""
    options = [*HOST, *DEVICE, *LINK, *architectures(), *_compiler()]
    return sources.digest(nvcc.version, platform.machine(), *options)


def _compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX") or "c++")


def build(out: Path, sources: Sources, nvcc: Nvcc, torch: Path, defines: Sequence[str] = ()) -> None:
    """Compile and link the library. ``out`` is whole at every moment.

    Args:
        out: the file; its folder is made.
        torch: the folder of the package torch, whose headers and library are used.
        defines: macros for the operators, ``NAME`` or ``NAME=value``.

    Raises:
        BuildError: a compiler fails, or a file cannot be written.
    """
    if shutil.which(_compiler()[0]) is None:
        raise BuildError(f"there is no C++ compiler: {_compiler()[0]} was not found, and CXX can name another")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=".build-") as folder:
            objects = _compile(Path(folder), sources, nvcc, torch, defines)
            linked = Path(folder) / out.name
            _run([str(nvcc.path), *_host_option(), *objects, "-o", str(linked), f"-L{torch / 'lib'}", *LINK])
            os.replace(linked, out)
    except OSError as error:
        raise BuildError(f"{error.filename or out} cannot be written: {error.strerror}") from error


def _compile(folder: Path, sources: Sources, nvcc: Nvcc, torch: Path, defines: Sequence[str]) -> list[str]:
    """Object files of all sources, compiled side by side."""
    jobs = int(os.environ.get("MAX_JOBS") or len(os.sched_getaffinity(0)))
    include = [f"-I{sources.kernels}"]
    headers = [f"-isystem{torch / 'include'}", *(f"-D{name}" for name in defines)]
    kernels = sorted(sources.kernels.glob("*.cu"))
    threads = f"--threads={max(1, jobs // len(kernels))}"  # for one file's architectures
    device = [str(nvcc.path), *_host_option(), *DEVICE, *architectures(), threads]
    commands = [[*device, *include, "-c", str(path)] for path in kernels]
    host = [*_compiler(), *HOST, *include, *headers]
    commands += [[*host, "-c", str(path)] for path in sorted(sources.operators.glob("*.cpp"))]
    objects = [str(folder / f"{Path(command[-1]).name}.o") for command in commands]
    with ThreadPoolExecutor(max(1, jobs)) as pool:
        list(pool.map(_run, [[*command, "-o", name] for command, name in zip(commands, objects)]))
    return objects


def _host_option() -> list[str]:
    """nvcc's own option for the host's compiler, where the user has chosen one and not told nvcc of another."""
    return ["-ccbin", _compiler()[-1]] if os.environ.get("CXX") and not os.environ.get("NVCC_CCBIN") else []


def _run(command: list[str]) -> str:
    """What a command prints.

    Raises:
        BuildError: it cannot be started or fails; with its first line that speaks of an error, or its last.
    """
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    except OSError as error:
        raise BuildError(f"{command[0]} cannot be started: {error.strerror}") from error
    if done.returncode:
        lines = [line.strip() for line in done.stdout.splitlines() if line.strip()] or [f"status {done.returncode}"]
        told = next((line for line in lines if "error" in line.lower()), lines[-1])
        output = f"{shlex.join(command)}\n{done.stdout}"
        raise BuildError(f"{Path(command[0]).name} failed: {told[:LAST_WORDS]}", output)
    return done.stdout
