"""What can be wrong with a compiled kernel, in words. Empty lists where nothing is."""

from __future__ import annotations

import re
from typing import TypedDict

from fastprefix.measure.kernels.compile_report import SHARED
from fastprefix.measure.kernels.gpu_units import GPUS
from fastprefix.measure.kernels.occupancy import occupancy
from tests.cuda.compiled.kernels import CompiledKernel
from tests.cuda.compiled.launch_shapes import LaunchShape

HOPPER = "sm_90a"
ONLY_HOPPER = ("ForwardSm90", "BackwardRows", "BackwardKeys")
NOT_HOPPER = ("ForwardSm80", "BackwardRowsSm80", "BackwardKeysSm80")
BARRIERS = ["SYNCS.EXCH.64", "SYNCS.ARRIVE.TRANS64", "SYNCS.PHASECHK.TRANS64.TRYWAIT", "USETMAXREG"]
COPIES = "LDGSTS.E.BYPASS.LTC128B.128"
# An A100's 164 KiB hold two blocks with two stages of keys and values, where an H100's 228 KiB hold three.
MOST_BLOCKS = {"sm_80": 2}
# Instructions of a kernel without a body: it traps, and what follows is padding.
EMPTY = {"MOV", "LDC", "EXIT", "BRA", "NOP", "BPT"}
# ld.local and st.local, to where registers are spilled and arrays lie that are indexed at run time.
LOCAL = ("LDL", "STL")
GROWTH = 0.05


class Counts(TypedDict):
    """What is recorded of a kernel."""

    registers: int
    loops: list[list[int]]


def of_ptxas(said: str) -> list[str]:
    """Lines of ``ptxas -v`` on spilled registers, and on wgmma that it made wait more often, which it calls info."""
    lines = [line.strip() for line in said.splitlines()]
    spilled = re.compile(r"\b[1-9]\d* bytes (stack frame|spill stores|spill loads)")
    return [line for line in lines if "(C75" in line or spilled.search(line)]


def of_resources(kernel: CompiledKernel, shape: LaunchShape) -> list[str]:
    """Memory of threads, and fewer blocks on a multiprocessor than the kernel's launch bounds say."""
    faults = [f"{kernel.count(name)} {name}" for name in LOCAL if kernel.count(name)]
    if kernel.stack:
        faults.append(f"{kernel.stack} bytes of stack")
    most = SHARED[90 if kernel.family in ONLY_HOPPER else 80]
    if shape.shared > most:
        faults.append(f"{shape.shared} bytes of shared memory, where a block has {most}")
        return faults
    # Registers are the same in all devices; other devices' shared memory is not looked at.
    gpus = {"sm_80": GPUS["a100"], HOPPER: GPUS["h100"]}
    shared = shape.shared if kernel.target in gpus else 0
    held = occupancy(shape.threads, kernel.registers, shared, gpus.get(kernel.target, GPUS["h100"]))
    wanted = min(shape.blocks, MOST_BLOCKS.get(kernel.target, shape.blocks))
    if held.blocks < wanted:
        faults.append(f"{held.blocks} blocks of a multiprocessor's {wanted}: {held.limit}")
    # setmaxnreg: the first warpgroup gives registers away, which the others take.
    if kernel.moved:
        wanted = 128 * min(kernel.moved) + (shape.threads - 128) * max(kernel.moved)
        if wanted > shape.threads * kernel.registers:
            faults.append(f"setmaxnreg {kernel.moved}: {kernel.registers} registers a thread are too few")
    return faults


def of_instructions(kernel: CompiledKernel) -> list[str]:
    """Instructions that the kernel should have and lacks, and products of another type."""
    if kernel.family in (NOT_HOPPER if kernel.target == HOPPER else ONLY_HOPPER):
        more = sorted({x.partition(".")[0] for x in kernel.opcodes} - EMPTY)
        return [f"code that {kernel.target} never runs: {', '.join(more)}"] if more else []
    faults = [f"no {name}" for name in _expected(kernel) if not kernel.count(name)]
    products = {x for x in kernel.opcodes if x.startswith(("HMMA", "HGMMA"))}
    bf16 = "bf16_t" in kernel.arguments
    faults += [f"{x} for {kernel.arguments[0]}" for x in products if (".BF16" in x) != bf16 or ".F32" not in x]
    return faults


def _expected(kernel: CompiledKernel) -> list[str]:
    """Names of instructions, whole up to a point.

    Raises:
        KeyError: of this kernel nobody has said what it is made of.
    """
    match kernel.family:
        case "DecodeAttend" | "ForwardSm80" | "BackwardRowsSm80" | "BackwardKeysSm80":
            return ["HMMA.16816", "LDSM.16.M88.4", "LDSM.16.MT88.4", COPIES]
        case "ForwardSm90":
            D, BLOCK_P = kernel.arguments[1:]
            shapes = [f"HGMMA.64x{n}x16" for n in dict.fromkeys((BLOCK_P, "128", D))]
            return [*shapes, *BARRIERS, "UTMALDG.4D", COPIES]
        case "BackwardRows":
            D, BLOCK_P = kernel.arguments[1:]
            return [*(f"HGMMA.64x{n}x16" for n in dict.fromkeys((BLOCK_P, "64", D))), *BARRIERS, COPIES]
        case "BackwardKeys":
            D = kernel.arguments[1]
            return [*(f"HGMMA.64x{n}x16" for n in dict.fromkeys(("64", D))), *BARRIERS, COPIES]
        case "BackwardDelta":
            return ["SHFL.BFLY", "LDG.E.128"]
        case "AddShares":
            width = "E.128" if kernel.arguments == ["Float4"] else "E"
            return [f"LDG.{width}", f"STG.{width}"]
        case "CombineShares":
            return ["SHFL.BFLY", "SHFL.IDX", "LDG.E.128"]
        case "ListBankTiles":
            return ["SHFL.UP", "BAR.SYNC"]
    raise KeyError(f"faults._expected has no {kernel.family}")


def of_growth(kernel: CompiledKernel, before: Counts) -> list[str]:
    """More registers than recorded, other loops, or loops with another number of instructions."""
    faults = []
    if kernel.registers > before["registers"]:
        faults.append(f"{kernel.registers} registers, before {before['registers']}")
    found, recorded = [list(x) for x in kernel.loops], before["loops"]
    same = len(found) == len(recorded) and all(
        now[1] == then[1] and all(abs(now[i] - then[i]) <= GROWTH * then[i] for i in (0, 2))
        for now, then in zip(found, recorded)
    )
    if not same:
        faults.append(f"loops of instructions, products, and instructions under branches {found}, before {recorded}")
    return faults
