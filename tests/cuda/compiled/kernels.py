"""What a compiled library's kernels are made of, as far as it can be counted."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest

from fastprefix.measure.kernels.sass import Function, parse
from fastprefix.measure.kernels.sass_loops import find_loops
from tests.cuda.compiled.binaries import cuobjdump

TENSOR = ("HMMA", "HGMMA")


@dataclass(frozen=True)
class CompiledKernel:
    """One kernel for one target.

    Attributes:
        name: of the struct that it runs, with its template's arguments: ``DecodeAttend<bf16_t, 64, 4, 1>``.
        stack: bytes of a thread, for spilled registers and for arrays that are indexed at run time.
        opcodes: how often each instruction stands in the code.
        loops: of each loop with matrix products, in the order of the code, the instructions that every iteration runs,
            how many of them are products, and the instructions under branches: loads of the next tile, and masks.
        moved: the registers of a thread that setmaxnreg sets.
    """

    name: str
    target: str
    registers: int
    stack: int
    opcodes: dict[str, int]
    loops: list[tuple[int, int, int]]
    moved: list[int]

    @property
    def family(self) -> str:
        """The name without arguments."""
        return self.name.partition("<")[0]

    @property
    def arguments(self) -> list[str]:
        return re.findall(r"\w+", self.name.partition("<")[2])

    def count(self, start: str) -> int:
        """Instructions whose names begin so, up to a point: HMMA.16816 is not HMMA.1688."""
        return sum(n for opcode, n in self.opcodes.items() if f"{opcode}.".startswith(f"{start}."))


def read_kernels(library: Path) -> list[CompiledKernel]:
    """All kernels of a library, an object file or a cubin, in no order of note."""
    resources = dict(_by_target(cuobjdump("--dump-resource-usage", library)))
    found = []
    for target, text in _by_target(cuobjdump("-sass", library)):
        functions = parse(text)
        for function, name in zip(functions, demangled(x.name for x in functions), strict=True):
            usage = re.search(rf"Function {re.escape(function.name)}:\s+REG:(\d+) STACK:(\d+)", resources[target])
            assert usage is not None, function.name
            found.append(_kernel(function, name, target, int(usage[1]), int(usage[2])))
    return found


def _by_target(text: str) -> Iterable[tuple[str, str]]:
    """What cuobjdump says of each target's binaries; a library has one of each source."""
    parts: dict[str, str] = {}
    # A cubin alone has no heading, and its listing names the target elsewhere.
    for part in text.split("Fatbin elf code:"):
        if found := re.search(r"^arch = (\w+)$", part, re.MULTILINE) or re.search(r"\bcode for (\w+)", part):
            parts[found[1]] = parts.get(found[1], "") + part
        elif "Resource usage" in part:
            parts[""] = part
    return parts.items()


def _kernel(function: Function, name: str, target: str, registers: int, stack: int) -> CompiledKernel:
    loops = [
        (len(loop.always), products, len(loop.sometimes))
        for loop in find_loops(function)
        if (products := sum(x.name in TENSOR for x in loop.always))
    ]
    moved = [int(x.operands.split(",")[-1], 0) for x in function.instructions if x.name == "USETMAXREG"]
    opcodes = dict(Counter(x.opcode for x in function.instructions))
    return CompiledKernel(name, target, registers, stack, opcodes, loops, moved)


def demangled(names: Iterable[str]) -> list[str]:
    """Kernels' structs as C++ writes them; skips the test where nothing can tell."""
    tool = shutil.which("c++filt") or shutil.which("cu++filt")
    if tool is None:
        pytest.skip("c++filt is not installed")
    given = "\n".join(names)
    text = subprocess.run([tool], input=given, capture_output=True, text=True, check=True).stdout
    entry = re.compile(r"^void fastprefix::kernel_entry<(.*?) ?>\(.*$")
    return [entry.sub(r"\1", line).replace("fastprefix::", "") for line in text.splitlines()]
