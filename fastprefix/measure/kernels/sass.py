"""SASS, the instructions that a GPU executes: from a binary, or a listing of one, to records.

Reads what ``nvdisasm -c -gi`` and ``cuobjdump -sass`` print, so that any compiler's binaries can be looked at.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

_FUNCTION = re.compile(r"^\s*(?:Function : (\S+)|\.section\s+\.text\.([^\s,]+))")
_LABEL = re.compile(r"^(\.L\w+):")
_PLACE = re.compile(r'//## File "([^"]+)", line (\d+)( inlined at)?')
_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?)\s*(?:;|$)")
_TARGET = re.compile(r"`\((\.L\w+)\)|\b0x([0-9a-f]+)\s*$")
# What is executed next is another instruction than the following one, or none.
_JUMPS = ("BRA", "BRX", "JMP", "JMX", "EXIT", "RET")

Place = tuple[str, int]  # a file's name and a line of it


@dataclass
class Instruction:
    """One instruction; ``places`` are its line in the source and the lines that it was inlined at, innermost first."""

    address: int
    opcode: str  # with its modifiers: HGMMA.64x128x16.F32.BF16
    operands: str = ""
    guarded: bool = False  # runs under a predicate
    target: int | None = None  # of a jump
    places: tuple[Place, ...] = ()

    @property
    def name(self) -> str:
        return self.opcode.partition(".")[0]

    @property
    def jumps(self) -> bool:
        return self.name in _JUMPS

    @property
    def falls_through(self) -> bool:
        """Whether the next instruction can follow: a branch has its condition as a guard or before its target."""
        return not self.jumps or self.guarded or (self.name == "BRA" and "," in self.operands)


@dataclass
class Function:
    """One kernel of a binary."""

    name: str
    instructions: list[Instruction] = field(default_factory=list)


def tool(name: str, option: str) -> str:
    """The path of one of NVIDIA's readers of binaries, the one in Triton's package or one on the path, for an option of
    ``fastprefix bench``.

    Raises:
        ValueError: it is not installed.
    """
    triton = importlib.util.find_spec("triton")
    folder = Path(triton.origin).parent if triton is not None and triton.origin else Path("triton")
    own = folder / "backends" / "nvidia" / "bin" / name
    found = str(own) if own.exists() else shutil.which(name)
    if found is None:
        raise ValueError(f"{option}: got no {name}, expected {own} or one on the path")
    return found


def is_binary(path: Path) -> bool:
    """Whether a file is a binary and not a listing.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return file.read(4) == b"\x7fELF"
    except OSError as error:
        raise ValueError(f"--binary: got {path}, expected a cubin or a listing of one ({error.strerror})") from error


def listing(path: Path) -> str:
    """The listing of a binary, with lines of the source where it has them; a file that is a listing as it is.

    Raises:
        ValueError: it cannot be read, or is another kind of binary.
    """
    if not is_binary(path):
        return path.read_text(errors="replace")
    command = [tool("nvdisasm", "--predict"), "-c", "-gi", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"--binary: got {path}, expected a cubin ({(done.stderr or done.stdout).strip()})")
    return done.stdout


def capability(text: str) -> int | None:
    """The compute capability that a listing is for, 90 for sm_90a; None where it does not say."""
    found = re.search(r"^\s*\.target\s+sm_(\d+)", text, re.MULTILINE)
    return int(found[1]) if found else None


def parse(text: str) -> list[Function]:
    """The functions of a listing; those without instructions are left out."""
    functions: list[Function] = []
    labels: dict[str, int] = {}
    pending: list[str] = []  # labels of the next instruction
    jumps: list[tuple[Instruction, str]] = []
    chain: list[Place] = []
    places: tuple[Place, ...] = ()
    for line in text.splitlines():
        if found := _FUNCTION.match(line):
            functions.append(Function(found[1] or found[2]))
            chain, places = [], ()
        elif found := _LABEL.match(line):
            pending.append(found[1])
        elif found := _PLACE.search(line):
            chain.append((Path(found[1]).name, int(found[2])))
            if not found[3]:  # the outermost call ends the chain
                places, chain = tuple(chain), []
        elif (found := _INSTRUCTION.match(line)) and functions:
            new = Instruction(int(found[1], 16), found[3], found[4], found[2] is not None, places=places)
            labels.update(dict.fromkeys(pending, new.address))
            pending.clear()
            if new.jumps and (target := _TARGET.search(new.operands)):
                if target[1]:
                    jumps.append((new, target[1]))
                else:
                    new.target = int(target[2], 16)
            functions[-1].instructions.append(new)
    for instruction, label in jumps:
        instruction.target = labels.get(label)
    return [function for function in functions if function.instructions]
