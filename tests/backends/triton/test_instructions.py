"""Instructions in the loops of compiled kernels: whole tiles of a prefix cost what content's do, and none has grown."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from fastprefix.measure.kernels.gpu_units import GPUS
from tests.backends.triton.count_instructions import HEAD_DIMS, KERNELS, PREFIX_LOOPS, RECORDED, compiler

KERNEL_GUIDE = Path(__file__).parents[3] / "docs" / "kernels.md"

each = pytest.mark.parametrize(("gpu", "D"), [(gpu, D) for gpu in sorted(GPUS) for D in HEAD_DIMS])


def run_compiled(*command: str) -> str:
    """What a module prints in a process of its own: in this one kernels may be interpreted."""
    env = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "FASTPREFIX_TILES")}
    done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@cache
def counted(gpu: str, D: int) -> dict[str, Any]:
    return dict(json.loads(run_compiled("tests.backends.triton.count_instructions", gpu, str(D))))


@pytest.mark.slow
@each
def test_a_whole_tile_of_a_prefix_costs_no_more_than_one_of_content(gpu: str, D: int) -> None:
    for kernel in PREFIX_LOOPS:
        found = counted(gpu, D)["equal tiles"][kernel]
        assert found["prefix"] <= 1.05 * found["content"], f"{kernel}: {found}"


@pytest.mark.slow
@each
def test_no_loop_has_grown(gpu: str, D: int) -> None:
    recorded = json.loads(RECORDED.read_text())
    if compiler() not in recorded:
        pytest.skip(f"instructions are recorded with {'; '.join(recorded)}, and here is {compiler()}")
    found, before = counted(gpu, D)["shipped"], recorded[compiler()][f"{gpu} D{D}"]
    assert set(found) == set(KERNELS)
    for kernel, counts in found.items():
        assert counts == [pytest.approx(x, rel=0.05) for x in before[kernel]], (
            f"{kernel}: python -m tests.backends.triton.count_instructions records other counts, if they are right"
        )


@pytest.mark.slow
def test_the_command_compiles_a_call() -> None:
    shape = ("--decode", "--shape", "32,32,8,512,2048,128", "--gpu", "a100", "--kernel", "decode_prefix", "--markdown")
    rows = [line.split(" | ") for line in run_compiled("fastprefix.cli", "bench", "--predict", *shape).splitlines()]
    launch, *loops = [row for row in rows if row[0] == "| decode_prefix"]
    assert launch[6] == "128", "programs, which are split for as many multiprocessors as the GPU has"
    assert [row[1].partition(":")[0] for row in loops] == ["prefix_attn_fwd.py"] * 2
    for row in loops:
        assert int(row[-2]) < int(row[-1].removesuffix(" |")), "overlapped is less than the sum"


def test_the_guide_has_the_recorded_counts() -> None:
    (recorded,) = json.loads(RECORDED.read_text()).values()
    table = re.findall(r"^\| `(\w+)` \| (\w+) \| (\d+) \| ([\d| ]+) \|$", KERNEL_GUIDE.read_text(), re.MULTILINE)
    found = {(kernel, f"{gpu.lower()} D{D}"): [int(x) for x in counts.split("|")] for kernel, gpu, D, counts in table}
    assert found == {(kernel, case): counts[kernel] for case, counts in recorded.items() for kernel in PREFIX_LOOPS}
