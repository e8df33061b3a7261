"""What every shipped kernel takes of a GPU, found without one: compiled for its target and read from the binary.

The calls are the backend's own, on meta tensors; where a launch would be there is a compilation, under a driver that
knows its target and nothing else.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from fastprefix.measure.device_errors import describe_error
from fastprefix.measure.kernels.compile_matrix import CompileJob, trace_launches
from fastprefix.measure.kernels.kernel_calls import matmul_rows
from fastprefix.measure.kernels.launch_recording import Launch

# Bytes of shared memory that one block can have. The table of sm_80 is also that of every device without one, and 8.6,
# 8.9 and 12.0 give a block 99 KiB where 8.0 gives 163.
SHARED = {80: 101376, 90: 232448}
WGMMA_ROWS = 64
PROCESSES = 8


@dataclass(frozen=True)
class Usage:
    """Registers a thread, bytes of stack (spills) and of shared memory, and which instructions there are."""

    registers: int
    stack: int
    shared: int
    wgmma: bool = False
    mma: bool = False
    tma: bool = False

    @property
    def tensor_cores(self) -> str:
        return " + ".join(name for name, there in (("wgmma", self.wgmma), ("mma.sync", self.mma)) if there) or "none"


class CompileResult(NamedTuple):
    """One kernel compiled, under the name that its tile has in the tables; and in words what is wrong with it."""

    job: CompileJob
    kernel: str
    options: dict[str, Any]
    usage: Usage | None
    reasons: list[str]


def find_faults(kernel: str, options: Mapping[str, Any], usage: Usage, capability: int) -> list[str]:
    """What is wrong with a kernel, in words; empty when nothing is."""
    reasons = []
    if usage.stack:
        reasons.append(f"spills: {usage.stack} bytes of stack")
    if usage.shared > SHARED[capability]:
        reasons.append(f"shared memory: {usage.shared} bytes of {SHARED[capability]}")
    rows = matmul_rows(kernel, options)
    if rows is not None and not (usage.wgmma or usage.mma):
        reasons.append("no tensor-core instruction")
    elif rows is not None and capability == 90 and rows >= WGMMA_ROWS and options["num_warps"] % 4 == 0 and usage.mma:
        reasons.append("mma.sync where wgmma is possible")
    if options.get("TMA") and not usage.tma:
        reasons.append("no TMA instruction")
    return reasons


def compile_all(jobs: Sequence[CompileJob]) -> Iterator[CompileResult]:
    """Compile every job, about a second each, on as many processors as there are; results in order.

    Raises:
        ValueError: kernels cannot be compiled here.
    """
    cuobjdump()
    processes = min(PROCESSES, os.cpu_count() or 1)
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(compile_job, jobs)


def compile_job(job: CompileJob) -> CompileResult:
    """Compile one kernel for its target and judge it; that it does not compile is a reason."""
    call = job.calls[0]
    found = trace_launches(call)
    assert found is not None, "a job is of what was launched"
    launch, asked, usage = found.launches[job.index], found.last, None
    kernel = launch.name
    try:
        usage = usage_of(launch, call.capability)
        reasons = find_faults(kernel, launch.options, usage, call.capability)
    except Exception as error:
        reasons = [f"does not compile: {_innermost(error)}"]
    if kernel == call.kernel:
        wanted = asked.tile.TMA and not {"strides", "bank"} & set(call.variant.has)
        if launch.options.get("TMA", wanted) != wanted:
            reasons.append(f"TMA is {not wanted}, which its row and arguments do not say")
        kernel = asked.kernel
    return CompileResult(job, kernel, launch.options, usage, reasons)


def _innermost(error: Exception) -> str:
    """Triton wraps an error once for every function that it is in, below a listing of each."""
    from triton.compiler.errors import CompilationError

    inner: BaseException = error
    while isinstance(inner, CompilationError) and isinstance(inner.__cause__, CompilationError):
        inner = inner.__cause__
    return str(inner).splitlines()[-1] if isinstance(inner, CompilationError) else describe_error(error)


def usage_of(launch: Launch, capability: int) -> Usage:
    """Compile a launch's kernel for a target and read what it takes."""
    with _target(capability):
        binary = launch.kernel.warmup(*launch.args, grid=(1,), **launch.options)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(binary.asm["cubin"])
        command = [cuobjdump(), "--dump-resource-usage", str(path)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {name: int(number) for name, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    ptx = binary.asm["ptx"]
    return Usage(
        registers=found["REG"],
        stack=found["STACK"] + found["LOCAL"],
        shared=binary.metadata.shared,
        wgmma="wgmma.mma_async" in ptx,
        mma="mma.sync" in ptx,
        tma="cp.async.bulk.tensor" in ptx,
    )


def cuobjdump() -> str:
    """NVIDIA's reader of binaries: Triton's own, or one on the path.

    Raises:
        ValueError: it, or Triton's compiler, is not here.
    """
    if importlib.util.find_spec("triton") is None:
        raise ValueError("--resources: got no triton, expected triton 3.6 or later: pip install 'fastprefix[triton]'")
    from fastprefix.backends.launch import run

    if run.INTERPRETED:
        value = os.environ.get("TRITON_INTERPRET")
        raise ValueError(f"--resources: got TRITON_INTERPRET={value}, expected it unset: it leaves nothing to compile")
    import triton

    own = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    found = str(own) if own.exists() else shutil.which("cuobjdump")
    if found is None:
        raise ValueError(f"--resources: got no cuobjdump, expected {own} or one on the path")
    return found


class _Driver:
    """A device that has a target and nothing else."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return 1000 + self.capability  # no real device's number, for kernels are kept by it

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)


@contextmanager
def _target(capability: int) -> Iterator[None]:
    from triton.runtime import driver

    # Not `driver.active`: without a GPU that raises. None is how it starts, and finds the machine's own when asked.
    before = getattr(driver, "_active", None)
    driver.set_active(_Driver(capability))
    try:
        yield
    finally:
        driver.set_active(before)
