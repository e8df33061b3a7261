"""The C++ kernels as other compilers build them and other processors run them, without torch: right by fp64.

A processor's plain vectors (``baseline``) are all that arm64 has; ``qemu-aarch64`` runs them where it is installed.
"""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from tests.support.operator_calls import make_call
from tests.support.operator_cases import prefix_bias
from tests.support.operator_oracle import truth

ROOT = Path(__file__).parents[2]
FLAGS = [
    "-std=c++20",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fwrapv",
    "-Wall",
    "-Wno-psabi",
    "-Wno-maybe-uninitialized",
    "-O1",
]
NAMES = ("o", "lse", "dq", "dk", "dv", "dprefix_k", "dprefix_v", "dprefix_bias")


class Target(NamedTuple):
    """A compiler, and what runs its programs here."""

    compiler: tuple[str, ...]
    runner: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()
    vectors: str | None = None  # the instruction set that it must take; None: the processor's best


TARGETS = {
    "gcc": Target(("g++",)),
    "gcc, plain vectors": Target(("g++",), environment=(("ATEN_CPU_CAPABILITY", "default"),), vectors="baseline"),
    "clang": Target(("clang++",)),
    "clang, avx2": Target(("clang++",), environment=(("ATEN_CPU_CAPABILITY", "avx2"),)),
    "clang, plain vectors": Target(("clang++",), environment=(("ATEN_CPU_CAPABILITY", "default"),), vectors="baseline"),
    "arm64": Target(("aarch64-linux-gnu-g++", "-static"), ("qemu-aarch64",), vectors="baseline"),
}
# Training in one pass and in two, and decoding with few rows; rows that fill no vector.
CALLS = {
    "training": {"B": 2, "S": 33, "P": 70, "D": 24, "D_v": 16},
    "short rows": {"B": 3, "S": 5, "P": 9, "softcap": 2.0},
    "window": {"B": 1, "S": 80, "P": 3, "window": 7},
    "decoding": {"B": 2, "S": 1, "T": 40, "P": 100},
    "bidirectional": {"B": 2, "S": 20, "P": 5, "causal": False, "scale": -0.3},
}


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, ...], Path]:
    """The driver by each compiler that has built it."""
    return {}


def built(compiler: tuple[str, ...], programs: dict[tuple[str, ...], Path], folder: Path) -> Path:
    """The driver as a compiler builds it, without a warning."""
    if compiler not in programs:
        if shutil.which(compiler[0]) is None:
            pytest.skip(f"{compiler[0]} is not installed")
        program = folder / compiler[0]
        sources = [*sorted((ROOT / "csrc/cpu").glob("*.cpp")), ROOT / "tests/native/other_compilers/driver.cpp"]
        line = [*compiler, *FLAGS, "-I", str(ROOT / "csrc"), *map(str, sources), "-o", str(program)]
        done = subprocess.run(line, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        programs[compiler] = program
    return programs[compiler]


def flat(x: Tensor) -> bytes:
    """The numbers in fp32, heads beside each other as models hold them."""
    dense = x.detach().float()
    bytes_: bytes = (dense.transpose(1, 2) if dense.dim() == 4 else dense).contiguous().numpy().tobytes()
    return bytes_


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("target", TARGETS)
def test_right(
    target: str,
    dtype: torch.dtype,
    programs: dict[tuple[str, ...], Path],
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    chosen = TARGETS[target]
    program = built(chosen.compiler, programs, tmp_path_factory.getbasetemp())
    if chosen.runner and shutil.which(chosen.runner[0]) is None:
        pytest.skip(f"{chosen.runner[0]} is not installed")
    for label, sizes in CALLS.items():
        torch.manual_seed(0)
        options = {name: sizes[name] for name in ("causal", "window", "softcap", "scale") if name in sizes}
        shape = {name: size for name, size in sizes.items() if name not in options}
        call = make_call(**shape, prefix_bias=prefix_bias(2, sizes["P"], hidden=2), **options)  # type: ignore[arg-type]
        call.leaves.update(
            {n: call.leaves[n].detach().to(dtype).float().requires_grad_() for n in ("q", "k", "v")}  # as it is read
        )
        q, k, v, prefix_k, prefix_v = call.leaves.values()
        want = truth(call)
        weight = torch.sin(torch.arange(want["o"].numel(), dtype=torch.float64) * 0.7).view(want["o"].shape)
        (B, H, S, D), K, T, P, E = q.shape, k.shape[1], k.shape[2], prefix_k.shape[1], v.shape[3]
        causal, window = sizes.get("causal", True), sizes.get("window", 0)
        numbers = (B, H, K, S, T, P, D, E, causal, window, dtype == torch.bfloat16)
        header = struct.pack("11q2d", *numbers, sizes.get("scale", D**-0.5), sizes.get("softcap", 0.0))
        tensors = (q, k, v, prefix_k, prefix_v, call.options["prefix_bias"], weight.to(dtype))
        (tmp_path / "in").write_bytes(header + b"".join(map(flat, tensors)))
        line = [*chosen.runner, str(program), str(tmp_path / "in"), str(tmp_path / "out")]
        done = subprocess.run(line, capture_output=True, text=True, env=dict(chosen.environment))
        assert done.returncode == 0, done.stderr
        assert chosen.vectors in (None, done.stdout.strip())
        found = torch.frombuffer(bytearray((tmp_path / "out").read_bytes()), dtype=torch.float32)
        for name in NAMES:
            like = want[name].transpose(1, 2) if want[name].dim() == 4 else want[name]
            got, found = found[: like.numel()].view(like.shape), found[like.numel() :]
            # In bf16 the output's gradient is rounded, and so are o and with it delta.
            tol = 2e-5 if dtype == torch.float32 else 3e-2
            torch.testing.assert_close(
                got.double(), like, rtol=tol, atol=tol * max(1.0, like.abs().max().item()), msg=f"{label}: {name}"
            )
