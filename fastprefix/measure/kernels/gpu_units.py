"""How many cycles the units of a multiprocessor need for the instructions of a loop.

A multiprocessor has four parts, and a block's warps are dealt out to them. The rates are the manufacturer's: throughput
of arithmetic instructions in the CUDA programming guide, tensor cores in the data sheets. None was measured here.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from fastprefix.measure.kernels.sass import Instruction

PARTS = 4
UNITS = ("tensor", "FP32", "ALU", "MUFU", "SHFL", "LSU", "issue")


@dataclass(frozen=True)
class Gpu:
    """A GPU: its multiprocessors, and what one of them has."""

    name: str
    capability: int
    sms: int
    fp32: int  # cycles of a part for an fp32 instruction of a warp
    products: int  # multiply-adds of 16-bit numbers a cycle, of one part's tensor core
    shared: int  # bytes of shared memory


GPUS = {
    "a100": Gpu("A100", capability=80, sms=108, fp32=2, products=256, shared=164 * 1024),
    "h100": Gpu("H100", capability=90, sms=132, fp32=1, products=512, shared=228 * 1024),
}

_FP32 = {"FADD", "FMUL", "FFMA", "IMAD", "IMUL", "HADD2", "HMUL2", "HFMA2", "FADD32I", "FMUL32I", "FFMA32I"}
_ALU = {"FSEL", "FSET", "FSETP", "FMNMX", "FCHK", "F2FP", "ISETP", "IMNMX", "VIMNMX", "IADD3", "VIADD", "IABS", "LEA"}
_ALU |= {"LOP3", "PLOP3", "SEL", "SHF", "SHL", "SHR", "PRMT", "MOV", "SGXT", "BMSK", "P2R", "R2P", "HSETP2", "HMNMX2"}
_MUFU = {"MUFU", "F2F", "F2I", "I2F", "FRND", "POPC", "FLO", "BREV"}
_LSU = {"LD", "LDG", "LDL", "LDS", "LDSM", "LDGSTS", "ST", "STG", "STL", "STS", "STSM", "ATOM", "ATOMG", "ATOMS", "RED"}
# Cycles of a part for an instruction of a warp. LSU: per 4 bytes of each thread, as the memory moves 128 a cycle.
_CYCLES = {"ALU": 2, "MUFU": 8, "SHFL": 4, "LSU": 4}
# Multiply-adds of a warp's HMMA by its shape, m16n8k16 and so on.
_PRODUCTS = {"16816": 2048, "1688": 1024, "1684": 512}


@dataclass(frozen=True)
class Cost:
    """One iteration of a loop by all warps of a block: instructions of a warp, and a multiprocessor's cycles, by unit.

    ``overlapped`` is the time if every unit could work at once, ``sum`` if tensor cores and the rest took turns. A
    kernel takes neither: see :data:`~fastprefix.measure.kernels.predict.UNCERTAINTY`.
    """

    counts: dict[str, int]
    cycles: dict[str, int]

    @property
    def binding(self) -> str:
        """The unit that is busy longest."""
        return max(UNITS, key=lambda unit: self.cycles[unit])

    @property
    def overlapped(self) -> int:
        return max(self.cycles.values())

    @property
    def sum(self) -> int:
        return self.cycles["tensor"] + max(self.cycles[unit] for unit in UNITS if unit != "tensor")


def unit_of(instruction: Instruction) -> str | None:
    """The unit that executes an instruction, None for those that are only issued."""
    if instruction.name in ("HMMA", "HGMMA"):
        return "tensor"
    units = (("FP32", _FP32), ("ALU", _ALU), ("MUFU", _MUFU), ("SHFL", {"SHFL"}), ("LSU", _LSU))
    return next((unit for unit, names in units if instruction.name in names), None)


def loop_cost(instructions: Sequence[Instruction], warps: int, gpu: Gpu) -> Cost:
    """What instructions cost that each of ``warps`` warps executes once.

    Raises:
        ValueError: a tensor-core instruction has an unknown shape.
    """
    turns = -(-warps // PARTS)  # warps of one part
    counts: Counter[str] = Counter({"issue": len(instructions)})
    cycles: Counter[str] = Counter({"issue": turns * len(instructions)})
    for x in instructions:
        unit = unit_of(x)
        if unit is not None:
            counts[unit] += 1
            cycles[unit] += turns * _cycles(x, unit, gpu)
    return Cost({unit: counts[unit] for unit in UNITS}, {unit: cycles[unit] for unit in UNITS})


def _cycles(x: Instruction, unit: str, gpu: Gpu) -> int:
    """Cycles of a part for one warp. The four warps of a warpgroup use the four tensor cores, one each."""
    match unit:
        case "tensor":
            return _tensor_cycles(x.opcode, gpu)
        case "FP32":
            return gpu.fp32
        case "LSU":
            matrices, bits = re.search(r"\.M[T]?88\.(\d)", x.opcode), re.search(r"\.(64|128)\b", x.opcode)
            return _CYCLES["LSU"] * (int(matrices[1]) if matrices else int(bits[1]) // 32 if bits else 1)
    return _CYCLES[unit]


def _tensor_cycles(opcode: str, gpu: Gpu) -> int:
    halved = 2 if "TF32" in opcode else 1
    if shape := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)\b", opcode):
        m, n, k = map(int, shape.groups())
        return m * n * k * halved // (PARTS * gpu.products)
    if (shape := re.match(r"HMMA\.(\d+)\b", opcode)) and shape[1] in _PRODUCTS:
        return _PRODUCTS[shape[1]] * halved // gpu.products
    raise ValueError(f"sass: got {opcode}, expected HGMMA.MxNxK or HMMA of {', '.join(_PRODUCTS)}")
