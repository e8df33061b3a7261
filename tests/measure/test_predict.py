"""Predictions from binaries: units, occupancy, ranks, the command, and what is refused."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from fastprefix import cli
from fastprefix.measure.kernels import sass
from fastprefix.measure.kernels.binary_options import BinaryOptions, parse_binary_options
from fastprefix.measure.kernels.gpu_units import GPUS, loop_cost
from fastprefix.measure.kernels.occupancy import occupancy
from fastprefix.measure.kernels.predict import PredictedKernel, PredictedLoop, rank
from fastprefix.measure.kernels.sass import Instruction
from fastprefix.measure.kernels.sass_loops import find_loops
from tests.measure.test_sass import LISTING

A100, H100 = GPUS["a100"], GPUS["h100"]


def test_what_units_take() -> None:
    """Eight warps are two for each part of a multiprocessor, and two warpgroups."""
    loop = find_loops(sass.parse(LISTING)[0])[0]
    cost = loop_cost(loop.always, 8, H100)
    assert cost.counts == {"tensor": 2, "FP32": 1, "ALU": 1, "MUFU": 1, "SHFL": 0, "LSU": 0, "issue": 9}
    assert cost.cycles == {"tensor": 2 * (64 + 32), "FP32": 2, "ALU": 4, "MUFU": 16, "SHFL": 0, "LSU": 0, "issue": 18}
    assert (cost.binding, cost.overlapped, cost.sum) == ("tensor", 192, 192 + 18)
    few = loop_cost(loop.always, 1, H100)
    assert few.cycles["issue"] == 9, "one warp keeps one part busy, and the others idle"


@pytest.mark.parametrize(
    ("opcode", "a100", "h100"),
    [
        ("HMMA.16816.F32.BF16", 8, 4),
        ("HMMA.1688.F32.TF32", 8, 4),
        ("HGMMA.64x256x16.F32", None, 128),
        ("HGMMA.64x64x8.F32.TF32", None, 32),
        ("LDS.128", 16, 16),
        ("LDSM.16.M88.4", 16, 16),
        ("LDSM.16.MT88.2", 8, 8),
        ("LDG.E.64", 8, 8),
        ("STS", 4, 4),
        ("FFMA", 2, 1),
        ("FSEL", 2, 2),
        ("MUFU.EX2", 8, 8),
        ("SHFL.BFLY", 4, 4),
        ("UIADD3", 1, 1),
    ],
)
def test_the_rates(opcode: str, a100: int | None, h100: int) -> None:
    for gpu, expected in ((A100, a100), (H100, h100)):
        if expected is not None:
            assert loop_cost([Instruction(0, opcode)], 4, gpu).overlapped == expected
    with pytest.raises(ValueError, match=r"got HMMA.999, expected HGMMA.MxNxK or HMMA of 16816"):
        loop_cost([Instruction(0, "HMMA.999")], 4, H100)


@pytest.mark.parametrize(
    ("threads", "registers", "shared", "gpu", "blocks", "limit"),
    [
        (256, 237, 163_856, H100, 1, "registers"),
        (256, 128, 0, H100, 2, "registers"),
        (256, 129, 0, H100, 1, "registers"),  # 129 registers are 136 in a warp's allocation
        (128, 32, 81_920, A100, 2, "shared memory"),
        (128, 32, 82_944, A100, 2, "shared memory"),
        (128, 32, 82_945, A100, 1, "shared memory"),
        (1024, 32, 0, A100, 2, "registers"),
        (1024, 16, 0, H100, 2, "warps"),
        (32, 16, 0, H100, 32, "blocks"),
    ],
)
def test_occupancy(threads: int, registers: int, shared: int, gpu: object, blocks: int, limit: str) -> None:
    found = occupancy(threads, registers, shared, gpu)
    assert (found.blocks, found.limit) == (blocks, limit)


def test_waves_and_the_last_of_them() -> None:
    held = occupancy(256, 128, 0, H100)
    assert held.waves(264 * 3 + 132, 132) == 3.5 and held.idle(264 * 3 + 132, 132) == pytest.approx(0.125)
    assert held.idle(264, 132) == 0.0
    with pytest.raises(ValueError, match=r"occupancy: got 1024 threads of 187 registers.*H100: registers are too few"):
        occupancy(1024, 187, 0, H100)


def test_launches_are_recorded_for_a_gpu_that_is_not_there() -> None:
    from fastprefix.backends.launch import launcher
    from fastprefix.measure.kernels.launch_recording import recorded_launches

    with recorded_launches(80, sms=A100.sms):
        assert launcher.num_sms(torch.empty(0)) == 108
        with recorded_launches(90):
            assert launcher.num_sms(torch.empty(0)) == 132
    assert launcher.num_sms(torch.empty(0)) == 132


def kernel(name: str, ffma: int, tile: tuple[int, int] | None = (128, 128)) -> PredictedKernel:
    """A kernel whose loop has a product of 256 cycles and ``ffma`` other instructions."""
    loop = [Instruction(0, "HGMMA.64x256x16.F32.BF16"), *(Instruction(0, "FFMA") for _ in range(ffma))]
    return PredictedKernel(name, 256, 128, 0, None, None, [PredictedLoop("", loop_cost(loop, 8, H100), 0)], tile)


def test_near_kernels_are_not_ranked() -> None:
    slow = kernel("slow", 500)
    with pytest.raises(
        ValueError, match=r"rank: got slow and near.* ratios of 0\.\d\d to 0\.\d\d, expected a factor of 1.5"
    ):
        rank(slow, kernel("near", 400))
    assert rank(slow, kernel("fast", 100)) == "second" and rank(kernel("fast", 100), slow) == "first"
    assert rank(slow, kernel("twice the work", 500, (128, 256))) == "second"
    with pytest.raises(
        ValueError, match=r"rank: got unknown, expected kernels with products in a loop and a tile=ROWSxKEYS"
    ):
        rank(slow, kernel("unknown", 500, None))


def test_the_sums_alone_do_not_rank() -> None:
    """Both ends of the range must agree: here tensor cores hide what the sum has."""
    with pytest.raises(ValueError, match="tells no smaller difference"):
        rank(kernel("a", 120), kernel("b", 10))


def test_options_of_a_binary() -> None:
    found = parse_binary_options("/a:b/fwd.cubin:threads=384,working=256,shared=163840,tile=128x64,kernel=fwd")
    assert found == BinaryOptions(Path("/a:b/fwd.cubin"), 384, 256, 163840, None, (128, 64), "fwd")
    assert parse_binary_options("x:threads=32") == BinaryOptions(Path("x"), 32, 32)
    for wrong in ("x", "x:", ":threads=32", "x:shared=0", "x:threads=0", "x:threads=32,tile=8", "x:threads=32,what=1"):
        with pytest.raises(ValueError, match="expected FILE:threads=N"):
            parse_binary_options(wrong)


def test_the_command_reads_a_listing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "attend.sass"
    path.write_text(LISTING)
    binary = ("--binary", f"{path}:threads=256,tile=128x128,programs=300")
    assert cli.main(["bench", "--predict", *binary, *binary, "--sms", "100"]) == 0
    out = capsys.readouterr().out
    assert "for H100 with 100 multiprocessors; nothing was run" in out and out.count("2: 192") == 2
    assert "whose cycles are in ratios of 1.00 to 1.00" in out and "TFLOP" not in out
    assert cli.main(["bench", "--predict", *binary, "--gpu", "a100"]) == cli.USER_ERROR
    assert f"--binary: got {path} for sm_90, expected sm_80 of A100" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--gpu", "a100"], "--gpu: expected --predict with it"),
        (["--predict", "--tune"], "--resources, --tune and --predict: expected one of them"),
        (
            ["--predict", "--binary", "/nowhere:threads=32"],
            "--binary: got /nowhere, expected a cubin or a listing of one",
        ),
        (["--predict"], "--predict: got TRITON_INTERPRET="),
    ],
)
def test_what_the_command_refuses(options: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    from fastprefix.backends.launch import launcher

    if "TRITON_INTERPRET" in complaint and not launcher.INTERPRETER:
        pytest.skip("kernels are not interpreted here")
    assert cli.main(["bench", *options]) == cli.USER_ERROR
    assert complaint in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
def test_a_binary_of_nvcc(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, cubin = tmp_path / "scale.cu", tmp_path / "scale.cubin"
    source.write_text(
        'extern "C" __global__ void scale(float *x, float a, int n) {\n#pragma unroll 1\n'
        "  for (int i = threadIdx.x; i < n; i += blockDim.x)\n    x[i] = exp2f(x[i] * a);\n}\n"
    )
    command = ["nvcc", "-cubin", "-lineinfo", "-use_fast_math", "-arch=sm_90", "-o", str(cubin), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    assert cli.main(["bench", "--predict", "--binary", f"{cubin}:threads=128"]) == 0
    (row,) = (line for line in capsys.readouterr().out.splitlines() if "scale.cu:" in line)
    assert "1: 8" in row and "2: 8" in row, "one MUFU; one load and one store"
