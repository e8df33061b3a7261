"""Record what the kernels are compiled to: ``python -m tests.cuda.compiled.record``.

That command writes registers and instructions of loops, which ``tests/cuda/test_compile.py`` holds the kernels to, for
the compiler at hand.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from fastprefix.cuda_library import build
from tests.cuda.compiled.collect import collect, collect_blackwell
from tests.cuda.compiled.faults import Counts
from tests.cuda.compiled.kernels import CompiledKernel
from tests.cuda.compiled.real_library import build_real

RECORDED = Path(__file__).with_name("recorded.json")

Targets = dict[str, dict[str, Counts]]  # by target and kernel


def compiler(nvcc: build.Nvcc) -> str:
    """The release, which decides what code there is: ``nvcc 13.0``."""
    return f"nvcc {'.'.join(nvcc.version.split('.')[:2])}"


def counts(kernels: list[CompiledKernel]) -> Targets:
    found: Targets = {}
    for x in sorted(kernels, key=lambda x: (x.target, x.name)):
        found.setdefault(x.target, {})[x.name] = {"registers": x.registers, "loops": [list(loop) for loop in x.loops]}
    return found


def recorded() -> dict[str, Targets]:
    """By compiler."""
    return dict(json.loads(RECORDED.read_text())) if RECORDED.exists() else {}


def as_text(found: dict[str, Targets]) -> str:
    """JSON with a line for each kernel."""
    compilers = []
    for name, targets in found.items():
        parts = []
        for target, kernels in targets.items():
            lines = ",\n".join(f"   {json.dumps(kernel)}: {json.dumps(x)}" for kernel, x in kernels.items())
            parts.append(f"  {json.dumps(target)}: {{\n{lines}\n  }}")
        body = ",\n".join(parts)
        compilers.append(f" {json.dumps(name)}: {{\n{body}\n }}")
    return "{\n" + ",\n".join(compilers) + "\n}\n"


def main() -> None:
    nvcc = build.find_nvcc()
    with tempfile.TemporaryDirectory() as name:
        library = Path(name) / "real.so"
        build_real(library, nvcc)
        kernels = collect(library, Path(name)).kernels + collect_blackwell(nvcc, Path(name)).kernels
    RECORDED.write_text(as_text({**recorded(), compiler(nvcc): counts(kernels)}))


if __name__ == "__main__":
    main()
