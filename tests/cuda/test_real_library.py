"""The library with kernels that nvcc has compiled: what it needs and shows, and what it says without a driver."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from fastprefix.cuda_library import build
from tests.cuda.compiled.binaries import nvcc
from tests.cuda.compiled.real_library import REAL
from tests.cuda.libraries import OPERATORS, TORCH, sources

pytestmark = pytest.mark.slow
STAND_IN = Path(__file__).with_name("fill_decode.cu")


def compiled(folder: Path, kernels: Sequence[Path], namespace: str, *defines: str) -> Path:
    found = nvcc()
    out = folder / f"{namespace}.so"
    build.build(out, sources(folder / namespace, *kernels), found, TORCH, [f"FASTPREFIX_LIBRARY={namespace}", *defines])
    assert [path for path in folder.iterdir() if path.name.startswith(".build")] == []
    return out


def inputs() -> tuple[object, ...]:
    q, k, p = (torch.randn(*size).bfloat16() for size in ((2, 4, 1, 64), (2, 2, 9, 64), (2, 5, 64)))
    return (q, k, k, p, p, *[None] * 7, 8, True, 0.125, 0, 0.0, 0)


def assert_loads(path: Path, namespace: str) -> None:
    """It needs torch's one library without CUDA or Python, and shows the linker nothing of its own."""
    if shutil.which("objdump") and shutil.which("nm"):
        needed = subprocess.run(["objdump", "-p", str(path)], capture_output=True, text=True, check=True).stdout
        libraries = re.findall(r"NEEDED\s+(\S+)", needed)
        assert "libtorch_cpu.so" in libraries
        assert not [name for name in libraries if re.match(r"lib(cuda|c10|torch_python|torch_cuda|python)", name)]
        rows = subprocess.run(["nm", "-D", "--defined-only", str(path)], capture_output=True, text=True).stdout
        names = {line.split()[-1] for line in rows.splitlines() if line.split()[-2] in "TDBR"}
        assert names <= {"__bss_start", "_edata", "_end", "_init", "_fini"}
    torch.ops.load_library(path)
    schema = str(getattr(torch.ops, namespace).decode.default._schema)
    assert schema.startswith(f"{namespace}::decode(Tensor q, Tensor k, Tensor v, Tensor prefix_k, Tensor prefix_v, ")


def test_it_loads_under_any_torch_and_python(tmp_path: Path) -> None:
    namespace = "fastprefix_cuda_stand_in"
    assert_loads(compiled(tmp_path, [STAND_IN], namespace), namespace)
    with pytest.raises(NotImplementedError, match="with arguments from the 'CPU' backend"):
        getattr(torch.ops, namespace).decode(*inputs())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a driver here")
def test_without_a_driver_a_call_is_an_error(real_library: Path) -> None:
    assert_loads(real_library, REAL)
    with pytest.raises(RuntimeError, match=r"the CUDA kernels of decoding: .*driver"):
        getattr(torch.ops, REAL).decode(*inputs())
    with pytest.raises(RuntimeError, match=r"the CUDA kernels of the forward: .*driver"):
        getattr(torch.ops, REAL).fused(*inputs())


def test_a_kernel_that_does_not_compile(tmp_path: Path) -> None:
    found = nvcc()
    wrong = tmp_path / "wrong.cu"
    wrong.write_text("int f() { return no_such_name; }\n")
    with pytest.raises(build.BuildError, match=r'nvcc failed: .*wrong\.cu\(1\): error: identifier "no_such_name"'):
        build.build(tmp_path / "lib.so", sources(tmp_path / "k", wrong), found, TORCH)
    assert OPERATORS.is_dir() and not (tmp_path / "lib.so").exists()
