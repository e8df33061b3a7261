"""What nvcc makes of the kernels: no spilled register, the tensor cores' instructions, and no loop that has grown.

The last of it is exact for one compiler, and is written by ``python -m tests.cuda.compiled.record``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.cuda.compiled import collect, faults
from tests.cuda.compiled.binaries import Binary, compile_binary, nvcc
from tests.cuda.compiled.collect import ALL_TARGETS, Collected
from tests.cuda.compiled.kernels import CompiledKernel, read_kernels
from tests.cuda.compiled.launch_shapes import LaunchShape
from tests.cuda.compiled.real_library import TARGETS, build_real
from tests.cuda.compiled.record import RECORDED, compiler, counts, recorded
from tests.cuda.emulated.mutants.fused_mutants import FUSED_MUTANTS
from tests.cuda.libraries import once

HERE = Path(__file__).parent / "compiled"
ONE_FORWARD = """
#include "forward/launches.cuh"
namespace fastprefix { template const char* launch_forward<bf16_t, 64, 16>(const AttentionCall&, void*); }
"""
# Of a kernel that is as it should be: what the checks do not take for a fault.
SHAPE = LaunchShape(threads=128, blocks=2, shared=72 * 1024)
OPCODES = {"HMMA.16816.F32.BF16": 32, "LDSM.16.M88.4": 8, "LDSM.16.MT88.4": 8, "LDGSTS.E.BYPASS.LTC128B.128.ZFILL": 8}
RIGHT = CompiledKernel("DecodeAttend<bf16_t, 64, 4, 1>", "sm_80", 245, 0, OPCODES, [(259, 32, 823)], [])
HOPPER = CompiledKernel("ForwardSm90<half_t, 64, 16>", "sm_90a", 168, 0, {}, [], [232, 40])

compiles = pytest.mark.slow
later = [pytest.param(x, marks=pytest.mark.exhaustive) for x in ALL_TARGETS if x not in TARGETS]
each_target = pytest.mark.parametrize("target", [*TARGETS, *later])


def collected_once(name: str, make: Callable[[Path], Collected], factory: pytest.TempPathFactory) -> Collected:
    return collect.load(once(factory, name, lambda out: collect.write(make(out.parent), out)))


@pytest.fixture(scope="session")
def collected(real_library: Path, tmp_path_factory: pytest.TempPathFactory) -> Collected:
    """bf16's kernels."""
    return collected_once("real.pickle", lambda folder: collect.collect(real_library, folder), tmp_path_factory)


@pytest.fixture(scope="session")
def blackwell(tmp_path_factory: pytest.TempPathFactory) -> Collected:
    compiler = nvcc()
    return collected_once("later.pickle", lambda out: collect.collect_blackwell(compiler, out), tmp_path_factory)


def collected_for(target: str, request: pytest.FixtureRequest) -> Collected:
    """What was compiled for a device; skips where the compiler does not know it."""
    found = request.getfixturevalue("collected" if target in TARGETS else "blackwell")
    assert isinstance(found, Collected)
    if not found.of(target):
        pytest.skip(f"{compiler(nvcc())} has no code for {target}")
    return found


@compiles
def test_ptxas_spills_nothing_and_serialises_no_products(collected: Collected) -> None:
    assert faults.of_ptxas(collected.said) == []
    assert collected.said.count("Compiling entry function") == len(collected.kernels), "it spoke of every kernel"


@compiles
@each_target
def test_blocks_fit_as_many_as_they_are_launched_for(target: str, request: pytest.FixtureRequest) -> None:
    made = collected_for(target, request)
    found = {x.name: faults.of_resources(x, made.shapes[x.name]) for x in made.of(target)}
    assert {name: wrong for name, wrong in found.items() if wrong} == {}


@compiles
@each_target
def test_kernels_use_what_they_were_written_for(target: str, request: pytest.FixtureRequest) -> None:
    made = collected_for(target, request).of(target)
    found = {x.name: faults.of_instructions(x) for x in made}
    assert {name: wrong for name, wrong in found.items() if wrong} == {}
    assert {x.family for x in made} >= {"DecodeAttend", "CombineShares", *faults.ONLY_HOPPER, *faults.NOT_HOPPER}


@compiles
@each_target
def test_no_kernel_has_grown(target: str, request: pytest.FixtureRequest) -> None:
    now, before = compiler(nvcc()), recorded()
    if now not in before:
        pytest.skip(f"registers and instructions are recorded with {'; '.join(before)}, and here is {now}")
    kernels = collected_for(target, request).of(target)
    known = {name for name in before[now][target] if "half_t" not in name}
    assert set(counts(kernels)[target]) == known, f"other kernels than in {RECORDED.name}"
    found = {x.name: faults.of_growth(x, before[now][target][x.name]) for x in kernels}
    assert {name: wrong for name, wrong in found.items() if wrong} == {}, (
        "python -m tests.cuda.compiled.record records other counts, if they are right"
    )


@pytest.mark.exhaustive
def test_both_types_are_one_kernel(tmp_path: Path) -> None:
    """What is true of bf16 is true of fp16."""
    build_real(tmp_path / "both.so", nvcc())
    both = collect.collect(tmp_path / "both.so", tmp_path)
    assert faults.of_ptxas(both.said) == []
    for target in TARGETS:
        made = {x.name: (x.registers, x.loops) for x in both.of(target)}
        for name, found in made.items():
            assert found == made[name.replace("bf16_t", "half_t")]


def compiled_forward(folder: Path, kernels: Path) -> Binary:
    source = folder / "forward.cu"
    source.write_text(ONE_FORWARD)
    return compile_binary(source, folder / "forward.fatbin", "sm_90a", kernels=kernels)


@compiles
@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("no wait for the scores", "C7514"),
        ("weights are overwritten while they are multiplied", "C7513"),
        ("no fence before the products", "C7519"),
    ],
)
def test_a_hazard_of_wgmma_is_found(tmp_path: Path, name: str, code: str) -> None:
    (mutant,) = (x for x in FUSED_MUTANTS if x.name == name)
    found = faults.of_ptxas(compiled_forward(tmp_path, mutant.write()).said)
    assert found and all(f"({code})" in line for line in found)


@compiles
def test_spilled_registers_are_found(tmp_path: Path) -> None:
    binary = compile_binary(HERE / "spills.cu", tmp_path / "spills.fatbin", "sm_80")
    (line,) = faults.of_ptxas(binary.said)
    assert "spill stores" in line
    (kernel,) = read_kernels(binary.path)
    found = " ".join(faults.of_resources(kernel, LaunchShape(1024, 2, 0)))
    assert re.fullmatch(r"\d+ LDL \d+ STL \d+ bytes of stack", found)


def test_a_kernel_as_it_should_be_has_no_faults() -> None:
    assert faults.of_resources(RIGHT, SHAPE) == faults.of_instructions(RIGHT) == []
    assert faults.of_growth(RIGHT, {"registers": 245, "loops": [[259, 32, 823]]}) == []


@pytest.mark.parametrize(
    ("kernel", "shape", "says"),
    [
        (replace(RIGHT, stack=16), SHAPE, "16 bytes of stack"),
        (RIGHT, replace(SHAPE, shared=100 * 1024), "102400 bytes of shared memory, where a block has 101376"),
        (RIGHT, replace(SHAPE, blocks=3, threads=256), "1 blocks of a multiprocessor's 2: registers"),
        (
            replace(RIGHT, registers=168),
            replace(SHAPE, shared=90 * 1024),
            "1 blocks of a multiprocessor's 2: shared memory",
        ),
        (HOPPER, LaunchShape(384, 1, 228 * 1024), "233472 bytes of shared memory, where a block has 232448"),
        (
            replace(HOPPER, moved=[240, 40]),
            LaunchShape(384, 1, 1024),
            "setmaxnreg [240, 40]: 168 registers a thread are too few",
        ),
    ],
)
def test_resources_that_are_too_scarce(kernel: CompiledKernel, shape: LaunchShape, says: str) -> None:
    assert faults.of_resources(kernel, shape) == [says]


@pytest.mark.parametrize("name", OPCODES)
def test_an_instruction_that_is_missing(name: str) -> None:
    kernel = replace(RIGHT, opcodes={x: count for x, count in OPCODES.items() if x != name})
    (fault,) = faults.of_instructions(kernel)
    assert name.startswith(fault.removeprefix("no "))


def test_instructions_of_another_type_or_device() -> None:
    half = replace(RIGHT, name=RIGHT.name.replace("bf16_t", "half_t"))
    assert faults.of_instructions(half) == ["HMMA.16816.F32.BF16 for half_t"]
    elsewhere = replace(HOPPER, target="sm_120", opcodes={"LDC": 1, "EXIT": 1, "UTMALDG.4D": 1})
    assert faults.of_instructions(elsewhere) == ["code that sm_120 never runs: UTMALDG"]
    assert faults.of_instructions(HOPPER)[0] == "no HGMMA.64x16x16"
    ampere = replace(RIGHT, name="ForwardSm80<bf16_t, 64, 16>", opcodes={**OPCODES, "EXIT": 1, "MOV": 1, "LDC": 1})
    assert faults.of_instructions(ampere) == []
    assert faults.of_instructions(replace(ampere, target="sm_90a")) == [
        "code that sm_90a never runs: HMMA, LDGSTS, LDSM"
    ]
    with pytest.raises(KeyError, match="has no NewKernel"):
        faults.of_instructions(replace(RIGHT, name="NewKernel<bf16_t>"))


@pytest.mark.parametrize(
    ("registers", "loops"),
    [
        (244, [[259, 32, 823]]),
        (245, [[246, 32, 823]]),
        (245, [[259, 64, 823]]),
        (245, [[259, 32, 780]]),
        (245, []),
        (245, [[259, 32, 823]] * 2),
    ],
)
def test_growth(registers: int, loops: list[list[int]]) -> None:
    assert len(faults.of_growth(RIGHT, {"registers": registers, "loops": loops})) == 1
