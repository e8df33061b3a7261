"""The library with the package's own kernels, compiled for the devices that a default build is for."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastprefix.cuda_library import build
from tests.cuda.compiled.binaries import KERNELS
from tests.cuda.libraries import OPERATORS, TORCH

REAL = "fastprefix_cuda_real"
# What is shipped.
ARCHITECTURES, TARGETS = "8.0;9.0a", ("sm_80", "sm_90a")


def words_of(library: Path) -> Path:
    """The file with all that the compilers said when they made a library, ptxas about each kernel."""
    return library.with_suffix(".log")


def build_real(out: Path, nvcc: build.Nvcc, fp16: bool = True) -> None:
    """Registered for a processor's tensors, so that a launch is reached where there is no device."""
    said: list[str] = []
    run = build._run

    def listening(command: list[str]) -> str:
        said.append(run(command))
        return said[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "_run", listening)
        patch.setenv(build.ARCHITECTURES, ARCHITECTURES)
        patch.setenv("NVCC_APPEND_FLAGS", "-Xptxas -v" + ("" if fp16 else " -DFASTPREFIX_ONLY_BF16"))
        patch.setenv("MAX_JOBS", "2")  # each compiler has one ptxas at a time, or their lines would mix
        sources = build.Sources(KERNELS, OPERATORS)
        defines = [f"FASTPREFIX_LIBRARY={REAL}", "FASTPREFIX_EMULATED"]
        whole = out.with_suffix(".unfinished")
        build.build(whole, sources, nvcc, TORCH, defines)
    words_of(out).write_text("".join(said))
    whole.replace(out)
