"""How kernels are launched, by the constants of their structs: a program prints them, as no binary has them all."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tests.cuda.compiled.binaries import KERNELS, nvcc

PROGRAM = """
#include <cstdio>
{includes}
using namespace fastprefix;
template <class Kernel>
void tell() {{
  std::printf("%d %d %lld\\n", Kernel::THREADS, Kernel::BLOCKS_PER_SM, static_cast<long long>(Kernel::SHARED_BYTES));
}}
int main() {{
{calls}
}}
"""


@dataclass(frozen=True)
class LaunchShape:
    """A block's threads, the blocks that a multiprocessor is to hold, and a block's bytes of dynamic shared memory."""

    threads: int
    blocks: int
    shared: int


def launch_shapes(names: Iterable[str], folder: Path) -> dict[str, LaunchShape]:
    """Those of kernels, by their names."""
    wanted = sorted(set(names))
    headers = sorted(path.relative_to(KERNELS) for path in KERNELS.glob("*/launches.cuh"))
    source, program = folder / "launch_shapes.cu", folder / "launch_shapes"
    includes = "\n".join(f'#include "{header}"' for header in headers)
    source.write_text(PROGRAM.format(includes=includes, calls="\n".join(f"  tell<{name}>();" for name in wanted)))
    command = [str(nvcc().path), "-std=c++17", f"-I{KERNELS}", "-o", str(program), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout.splitlines()
    return {name: LaunchShape(*map(int, line.split())) for name, line in zip(wanted, lines, strict=True)}
