"""How many blocks of a kernel share a multiprocessor, and in how many waves a GPU runs all of them."""

from __future__ import annotations

from dataclasses import dataclass

from fastprefix.measure.kernels.gpu_units import Gpu

# Of compute capabilities 8.0 and 9.0, from the CUDA programming guide.
REGISTERS = 65536
REGISTER_UNIT = 256  # a warp's registers are a multiple of it
WARPS, WARP_UNIT = 64, 4
BLOCKS = 32
SHARED_UNIT, SHARED_RESERVED = 128, 1024  # bytes; the second of each block


@dataclass(frozen=True)
class Occupancy:
    """Blocks that a multiprocessor holds at a time, and what they run out of."""

    blocks: int
    limit: str

    def waves(self, programs: int, sms: int) -> float:
        """How often the GPU is filled by ``programs`` blocks of equal length; 3.5 is three times and a half."""
        return programs / (self.blocks * sms)

    def idle(self, programs: int, sms: int) -> float:
        """The share of the GPU's places that stays empty until the last wave ends, again of blocks of equal length."""
        waves = self.waves(programs, sms)
        return 1.0 - waves / -(-waves // 1)


def occupancy(threads: int, registers: int, shared: int, gpu: Gpu) -> Occupancy:
    """The blocks of ``threads`` threads that fit, each thread with ``registers``, each block with ``shared`` bytes.

    Raises:
        ValueError: not even one fits.
    """
    warps = -(-threads // 32)
    unit = -(-32 * max(registers, 1) // REGISTER_UNIT) * REGISTER_UNIT
    memory = -(-(shared + SHARED_RESERVED) // SHARED_UNIT) * SHARED_UNIT
    fitting = {
        "registers": REGISTERS // unit // WARP_UNIT * WARP_UNIT // warps,
        "shared memory": gpu.shared // memory,
        "warps": WARPS // warps,
        "blocks": BLOCKS,
    }
    limit = min(fitting, key=lambda name: fitting[name])
    if fitting[limit] < 1:
        raise ValueError(
            f"occupancy: got {threads} threads of {registers} registers and {shared} bytes of shared memory, expected "
            f"a block that fits into a multiprocessor of the {gpu.name}: {limit} are too few"
        )
    return Occupancy(fitting[limit], limit)
