"""What the build makes: a file that loads, shows Python one name, and keeps to the instructions that were asked for."""

from __future__ import annotations

import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from fastprefix import _extension

PACKAGE = Path(_extension.__file__).parent
# In AT&T's spelling. Registers and masks that came with AVX-512, and the tiles of AMX; then everything that came after
# SSE2: the mnemonics of AVX and its extensions begin with v, those of BMI do not.
AFTER_AVX2 = re.compile(r"%[zt]mm\d|%k[0-7]|%[xy]mm(1[6-9]|2\d|3[01])")
AFTER_SSE2 = re.compile(r"v|(andn|bextr|bls(i|r|msk)|bzhi|mulx|pdep|pext|popcnt|lzcnt|rorx|sarx|shlx|shrx)[lq]?\b")


def test_what_can_be_built_is_there() -> None:
    """A compiler's error and a file that does not load are red; a machine that cannot build it is not."""
    module, absence = _extension.load()
    if module is None:
        assert "the build failed" not in absence
        assert "switched off" in absence or not (PACKAGE / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}").exists(), (
            absence
        )
        pytest.skip(absence)
    assert module.built_for() == torch.__version__


def disassembled(library: str) -> Iterator[tuple[str, str]]:
    """Every instruction, after the C++ name of the function that it is in."""
    command = ["objdump", "-d", "--no-show-raw-insn", "-C", library]
    function = ""
    for line in subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines():
        if header := re.fullmatch(r"[0-9a-f]+ <(.*)>:", line):
            function = header[1]
        elif "\t" in line:
            yield function, line.split("\t", 1)[1]


def tool(name: str) -> None:
    if shutil.which(name) is None:
        pytest.skip(f"{name} is not installed")


def misplaced(found: Iterator[tuple[str, str]]) -> dict[str, str]:
    """Functions that run on any processor, each with an instruction that only some have.

    What a pragma compiles for a newer processor stands in a namespace, ``avx2`` or one that begins with ``avx512``. An
    inline function or a template of a header that is compiled under the pragma does not, and the linker keeps one copy
    of it for everybody: on an older processor that is an illegal instruction far from any kernel.
    """
    bad = {}
    for function, instruction in found:
        newest = "avx512::" if AFTER_AVX2.search(instruction) else "avx2::" if AFTER_SSE2.match(instruction) else ""
        allowed = {"avx512::": r"\bavx512\w*::", "avx2::": r"\bavx(2|512)\w*::", "": ""}[newest]
        if not re.search(allowed, function):
            bad.setdefault(function, instruction)
    return bad


def test_newer_instructions_stay_in_their_namespaces(native: ModuleType) -> None:
    tool("objdump")
    assert not misplaced(disassembled(str(native.__file__)))


def test_a_misplaced_instruction_is_seen() -> None:
    lines = [
        ("fastprefix::avx512::fwd(float*)", "vaddps %zmm0,%zmm1,%zmm2"),
        ("void at::parallel_for<fastprefix::avx512::fwd(float*)::{lambda(long)#1}>", "kmovw  %eax,%k1"),
        ("fastprefix::avx2::fwd(float*)", "vfmadd231ps (%rax),%ymm1,%ymm2"),
        ("fastprefix::fwd(float*)", "addps  %xmm1,%xmm2"),
    ]
    assert not misplaced(iter(lines))
    bad = [
        ("fastprefix::avx2::fwd(float*)", "vaddps %ymm16,%ymm1,%ymm2"),
        ("std::vector<float>::resize(unsigned long)", "vmovups %ymm0,(%rax)"),
        ("fastprefix::run_avx512(float*)", "vaddps %zmm0,%zmm1,%zmm2"),
        ("fastprefix::fwd(float*)", "shlx   %rax,%rbx,%rcx"),
    ]
    assert list(misplaced(iter(bad)).items()) == bad


def test_python_sees_one_name(native: ModuleType) -> None:
    """Weak symbols are those of C++'s own library, which every extension shares."""
    tool("nm")
    command = ["nm", "-D", "--defined-only", str(native.__file__)]
    rows = [line.split() for line in subprocess.run(command, capture_output=True, text=True).stdout.splitlines()]
    made_by_the_linker = {"__bss_start", "_edata", "_end", "_init", "_fini"}
    assert {name for *_, kind, name in rows if kind in "TDBR"} - made_by_the_linker == {"PyInit__C"}


def test_no_second_runtime_of_openmp(native: ModuleType) -> None:
    tool("objdump")
    done = subprocess.run(["objdump", "-p", str(native.__file__)], capture_output=True, text=True, check=True)
    needed = re.findall(r"NEEDED\s+(\S+)", done.stdout)
    assert "libtorch_cpu.so" in needed and not [name for name in needed if "omp" in name]
