"""Hopper's instructions as a CUDA compiler gets them: each wrapper becomes the machine instruction that it means."""

from __future__ import annotations

import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.emulator.build import ROOT

# A compiler runs.
pytestmark = pytest.mark.slow


def tool(name: str) -> str:
    """The path of one of NVIDIA's tools; Triton has cuobjdump. Skips the test where there is none."""
    folders = [str(Path(spec.origin).parent / "backends/nvidia/bin") for spec in [find_spec("triton")] if spec]
    path = shutil.which(name) or shutil.which(name, path=":".join(folders))
    if path is None:
        pytest.skip(f"{name} is not installed")
    return path


def test_wrappers_become_hopper_instructions(tmp_path: Path) -> None:
    cubin = tmp_path / "hopper.cubin"
    options = ["-std=c++20", "-arch=sm_90a", "-cubin", "-Xptxas", "-v", f"-I{ROOT / 'kernels/cuda'}", "-o", str(cubin)]
    command = [tool("nvcc"), *options, str(ROOT / "tests/emulator/hopper_ptx.cu")]
    said = subprocess.run(command, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    # C75xx: ptxas made wgmma wait more often, or ignored setmaxnreg.
    assert "C75" not in said.stderr
    command = [tool("cuobjdump"), "-sass", str(cubin)]
    sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    product = r"HGMMA\.64x(\d+)x16\.F32(\.BF16)? R\d+, (R\d+, )?gdesc\[\w+\](\.tnspB)?"
    found = {(int(n), *map(bool, rest)) for n, *rest in re.findall(product, sass)}
    # N, bf16, a in registers, b MN-major: of the last, hopper_ptx.cu has one for each type and source of a.
    sides = (False, True)
    assert found == {(n, bf16, rs, bf16 == rs) for n in (16, 32, 64, 128, 192, 256) for bf16 in sides for rs in sides}
    for opcode, count in {
        **{f"UTMALDG.{rank}D": 1 for rank in (2, 3, 4, 5)},
        "SYNCS.EXCH.64": 1,
        "SYNCS.ARRIVE.TRANS64": 2,
        "SYNCS.PHASECHK.TRANS64.TRYWAIT": 2,
        "FENCE.VIEW.ASYNC": 1,
        "BAR.SYNC": 1,
        "BAR.ARV": 1,
        "USETMAXREG": 2,
    }.items():
        assert sass.count(opcode) >= count, opcode
