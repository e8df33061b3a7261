"""The registers, spills and shared memory of every shipped kernel, read from binaries compiled without a GPU.

The backend is called on meta tensors. Each launch is replaced by a compilation, under a stub of Triton's driver that
knows the target and nothing else.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from fastprefix.machine.device_errors import describe_error
from fastprefix.measure.kernels.compile_matrix import CompileJob, trace_launches
from fastprefix.measure.kernels.kernel_calls import matmul_rows
from fastprefix.measure.kernels.launch_recording import Launch
from fastprefix.measure.kernels.sass import tool

# Bytes of shared memory that one block can have. Devices without a table use that of sm_80; among them 8.6, 8.9 and
# 12.0 give a block 99 KiB only, where 8.0 gives 163 KiB.
SHARED = {80: 101376, 90: 232448}
WGMMA_ROWS = 64
PROCESSES = 8


@dataclass(frozen=True)
class Usage:
    """What a binary uses: registers of a thread, bytes of stack (spills), of shared memory; and its instructions."""

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
    """One compiled kernel, under the name that its tile has in the tables, and what is wrong with it, in words."""

    job: CompileJob
    kernel: str
    options: dict[str, Any]
    usage: Usage | None
    reasons: list[str]


def find_faults(kernel: str, options: Mapping[str, Any], usage: Usage, capability: int) -> list[str]:
    """What is wrong with a compiled kernel, in words; empty when nothing is."""
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
    """Compile every job, about a second each, in several processes; results in order.

    Raises:
        ValueError: kernels cannot be compiled on this machine.
    """
    cuobjdump()
    processes = min(PROCESSES, os.cpu_count() or 1)
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(compile_job, jobs)


def compile_job(job: CompileJob) -> CompileResult:
    """Compile one kernel for its target and check it; a failed compilation is a reason, not an exception."""
    call = job.calls[0]
    found = trace_launches(call)
    assert found is not None, "jobs are made of recorded launches"
    launch, asked, usage = found.launches[job.index], found.last, None
    kernel = launch.name
    try:
        usage = usage_of(launch, call.capability)
        reasons = find_faults(kernel, launch.options, usage, call.capability)
    except Exception as error:
        reasons = [f"does not compile: {_innermost_message(error)}"]
    if kernel == call.kernel:
        wanted = asked.tile.TMA and not {"strides", "bank"} & set(call.variant.has)
        if launch.options.get("TMA", wanted) != wanted:
            reasons.append(f"TMA is {not wanted}, which its row and arguments do not say")
        kernel = asked.kernel
    return CompileResult(job, kernel, launch.options, usage, reasons)


def _innermost_message(error: Exception) -> str:
    """The message of the innermost error: Triton wraps it once for every function, each time after a listing."""
    from triton.compiler.errors import CompilationError

    inner: BaseException = error
    while isinstance(inner, CompilationError) and isinstance(inner.__cause__, CompilationError):
        inner = inner.__cause__
    return str(inner).splitlines()[-1] if isinstance(inner, CompilationError) else describe_error(error)


def usage_of(launch: Launch, capability: int) -> Usage:
    """Compile the kernel of a launch for a target and read the resources that it uses."""
    return read_usage(compile_launch(launch, capability))


def compile_launch(launch: Launch, capability: int) -> Any:
    """Triton's compiled kernel of a launch, for a target that need not be there."""
    with _target(capability):
        return launch.kernel.warmup(*launch.args, grid=(1,), **launch.options)


def read_usage(binary: Any) -> Usage:
    """The resources that a compiled kernel uses."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(binary.asm["cubin"])
        (found,) = resource_usage(path, "--resources").values()
    ptx = binary.asm["ptx"]
    return Usage(
        registers=found["REG"],
        stack=found["STACK"] + found["LOCAL"],
        shared=binary.metadata.shared,
        wgmma="wgmma.mma_async" in ptx,
        mma="mma.sync" in ptx,
        tma="cp.async.bulk.tensor" in ptx,
    )


def resource_usage(cubin: Path, option: str) -> dict[str, dict[str, int]]:
    """What cuobjdump tells of each kernel of a binary: REG, STACK, LOCAL, and SHARED without what a launch asks for."""
    command = [tool("cuobjdump", option), "--dump-resource-usage", str(cubin)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"Function (\S+):\s+(.*)", text)
    return {name: {key: int(number) for key, number in re.findall(r"\b([A-Z]+):(\d+)", line)} for name, line in found}


def cuobjdump(option: str = "--resources") -> str:
    """The path of cuobjdump, where kernels can be compiled for an option of ``fastprefix bench``.

    Raises:
        ValueError: cuobjdump or Triton's compiler is not installed.
    """
    if importlib.util.find_spec("triton") is None:
        raise ValueError(f"{option}: got no triton, expected triton 3.6 or later: pip install 'fastprefix[triton]'")
    from fastprefix.backends.launch import launcher

    if launcher.INTERPRETER:
        value = os.environ.get("TRITON_INTERPRET")
        raise ValueError(f"{option}: got TRITON_INTERPRET={value}, expected it unset: it leaves nothing to compile")
    return tool("cuobjdump", option)


class _Driver:
    """A stub of Triton's driver: a device that has a target and nothing else."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return 1000 + self.capability  # the number of no real device, since Triton caches kernels by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)


@contextmanager
def _target(capability: int) -> Iterator[None]:
    from triton.runtime import driver

    # Not `driver.active`, which raises without a GPU. With `_active` None, Triton finds the machine's driver on demand.
    before = getattr(driver, "_active", None)
    driver.set_active(_Driver(capability))
    try:
        yield
    finally:
        driver.set_active(before)
