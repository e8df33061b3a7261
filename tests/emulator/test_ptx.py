"""Instructions as a CUDA compiler gets them: each wrapper becomes the machine instruction that it means."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.cuda.compiled.binaries import KERNELS, compile_binary, cuobjdump
from tests.emulator.build import ROOT

# A compiler runs.
pytestmark = pytest.mark.slow
SOURCES = ROOT / "tests/emulator"

# Of each kernel of ptx.cu the instruction, with what a device adds to or leaves out of its name as a pattern.
ALONE = {
    "sync_block": r"BAR\.SYNC\S*",
    "shfl_xor": r"SHFL\.BFLY",
    "shfl_idx": r"SHFL\.IDX",
    "shfl_idx_int": r"SHFL\.IDX",
    "shfl_up": r"SHFL\.UP",
    "vote_all": r"VOTE\.ALL",
    "thread_index_again": r"STG\.E",  # what it reads is a special register that every kernel reads
    "half_to_float": r"HADD2\.F32",
    "ex2_approx": r"MUFU\.EX2",
    "lg2_approx": r"MUFU\.LG2",
    "rcp_approx": r"MUFU\.RCP",
    "pack_bf16": r"F2FP\.BF16(\.F32)?\.PACK_AB",
    "pack_half": r"F2FP(\.F16\.F32)?\.PACK_AB",
    "ld_st_global": r"(LD|ST)G\.E",
    "ld_st_global_2": r"(LD|ST)G\.E\.64",
    "ld_st_global_4": r"(LD|ST)G\.E\.128",
    "ld_shared": r"LDS",
    "ld_shared4": r"LDS\.128",
    "ld_shared_bits4": r"LDS\.128",
    "ld_shared_int": r"LDS",
    "st_shared": r"STS",
    "st_shared_int": r"STS",
    "st_shared_2": r"STS\.64",
    "st_shared_4": r"STS\.128",
    "cp_async_16": r"LDGSTS\.E\.BYPASS\.LTC128B\.128\.ZFILL",
    "cp_async_commit_group": r"LDGDEPBAR",
    "cp_async_wait_group": r"DEPBAR\.LE",
    "ldmatrix_x4": r"LDSM\.16\.M88\.4",
    "ldmatrix_x4_trans": r"LDSM\.16\.MT88\.4",
    "mma_bf16": r"HMMA\.16816\.F32\.BF16",
    "mma_half": r"HMMA\.16816\.F32",
}
# What these instructions are known by, whatever follows in their names.
SPECIAL = re.compile(r"(BAR|SHFL|VOTE|MUFU|F2FP|HADD2|LDS|LDSM|LDGSTS|LDGDEPBAR|DEPBAR|STS|HMMA)\b")


@pytest.mark.parametrize("target", ["sm_80", "sm_90a"])
def test_each_wrapper_becomes_its_instruction(tmp_path: Path, target: str) -> None:
    found = compile_binary(SOURCES / "ptx.cu", tmp_path / "ptx.fatbin", target).functions()
    assert set(found) == {f"alone_{name}" for name in ALONE}
    for name, pattern in ALONE.items():
        # Guarded ones are the padding that ptxas puts before a LDGSTS, and never run.
        opcodes = [x.opcode for x in found[f"alone_{name}"].instructions if not x.guarded]
        special = {x for x in opcodes if SPECIAL.match(x)} or {x for x in opcodes if x.startswith(("LDG", "STG"))}
        assert special and all(re.fullmatch(pattern, x) for x in special), (name, opcodes)
    waits = [x.operands for x in found["alone_cp_async_wait_group"].instructions if x.name == "DEPBAR"]
    assert waits == ["SB0, 0x3"], "groups that may be on their way"


def test_every_instruction_of_the_wrappers_is_looked_at() -> None:
    """A new function with an asm of its own needs a kernel in ptx.cu."""
    text = (KERNELS / "wrappers.cuh").read_text().partition("#else")[0]
    functions = [x for x in re.split(r"^FP_DEVICE ", text, flags=re.MULTILINE) if "asm" in x]
    names = {name for x in functions for name in re.findall(r"^[\w ]+? (\w+)\(", x)}
    assert len(names) >= 10
    assert names <= set(re.findall(r"\b(\w+)[<(]", (SOURCES / "ptx.cu").read_text()))


def test_wrappers_become_hopper_instructions(tmp_path: Path) -> None:
    binary = compile_binary(SOURCES / "hopper_ptx.cu", tmp_path / "hopper.fatbin", "sm_90a")
    # C75xx: ptxas made wgmma wait more often, or ignored setmaxnreg.
    assert "(C75" not in binary.said
    sass = cuobjdump("-sass", binary.path)
    product = r"HGMMA\.64x(\d+)x16\.F32(\.BF16)? R\d+, (R\d+, )?gdesc\[\w+\](\.tnspB)?"
    found = {(int(n), *map(bool, rest)) for n, *rest in re.findall(product, sass)}
    # N, bf16, a in registers, b MN-major: of the last, hopper_ptx.cu has one for each type and source of a.
    sides = (False, True)
    assert found == {(n, bf16, rs, bf16 == rs) for n in (16, 32, 64, 128, 192, 256) for bf16 in sides for rs in sides}
    for opcode, count in {
        **{f"UTMALDG.{rank}D": 1 for rank in (2, 3, 4, 5)},
        "SYNCS.EXCH.64": 1,
        "SYNCS.ARRIVE.TRANS64": 2,
        "SYNCS.PHASECHK.TRANS64.TRYWAIT": 2,
        "FENCE.VIEW.ASYNC": 1,
        "BAR.SYNC": 1,
        "BAR.ARV": 1,
        "USETMAXREG": 2,
    }.items():
        assert sass.count(opcode) >= count, opcode
