"""What only the C++ kernels promise: bits that no number of threads changes, every instruction set, exact conversions.

That they are right is tested with every other backend's, in tests/operator.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from fastprefix import prefix_attention
from tests.support.operator_calls import Call, make_call, run

pytestmark = pytest.mark.usefixtures("native")
ROOT = Path(__file__).resolve().parents[2]

CALLS: dict[str, Callable[[], Call]] = {
    "one row of one sample": lambda: make_call(B=1, S=1, T=300, P=1200, D=64),
    "rows of many samples": lambda: make_call(B=7, S=1, T=40, P=700, D=64),
    "one long sample": lambda: make_call(B=1, S=700, P=20, D=32),
    "many samples": lambda: make_call(B=5, S=70, P=300, D=32),
    "few rows": lambda: make_call(B=9, S=3, T=30, P=400, D=64),
    "a bank": lambda: make_call(B=6, S=4, N=3, P=300, D=32, prefix_ids=torch.tensor([2, 0, 2, -1, 1, 2])),
    "by token": lambda: make_call(B=3, S=40, N=3, P=90, D=32, prefix_ids=torch.randint(-1, 3, (3, 40))),
}


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", CALLS)
def test_same_bits_for_any_number_of_threads(name: str, threads: Callable[[int], None]) -> None:
    call = CALLS[name]()
    threads(1)
    alone = run(call, "native")
    for number in (2, 3, 5):
        threads(number)
        for what, found in run(call, "native").items():
            assert torch.equal(found, alone[what]), (number, what)


def test_a_static_cache_is_read_where_it_is_visible_only() -> None:
    """Behind the last key that a row may see, and before the window, lies memory that was never written."""
    call = make_call(B=2, S=2, T=500, P=8, D=64, q_start=torch.tensor([40, 100]), window=30)
    seen = run(call, "native")
    for name in ("k", "v"):
        leaf = call.leaves[name].detach().clone()
        leaf[0, :, 42:] = leaf[1, :, 102:] = float("nan")
        leaf[0, :, :11] = leaf[1, :, :71] = float("nan")
        call.leaves[name] = leaf.requires_grad_()
    for what, found in run(call, "native").items():
        assert torch.equal(found, seen[what]), what


EXACT = """
import torch
from fastprefix import _extension, prefix_attention

def one_key(v, dtype):
    q = torch.zeros(v.shape[0], 1, 1, 16, dtype=dtype)
    nothing = torch.zeros(1, 0, v.shape[-1], dtype=v.dtype)
    own = v.to(dtype).view(-1, 1, 1, v.shape[-1])
    content = prefix_attention(q, q, own, nothing[..., :16], nothing, backend="native")
    q, none = q[:1], own[:1, :, :0]
    k = v.new_zeros(1, 1, 16)
    shared = [prefix_attention(q, q[:, :, :0], none, k, x.view(1, 1, -1), backend="native") for x in v]
    return content.flatten(), torch.stack(shared).flatten()

assert _extension.load().module.instruction_set() == NAME
for dtype in (torch.float16, torch.bfloat16):
    every = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(dtype).view(256, 256)
    every = torch.where(every.isfinite(), every, torch.zeros((), dtype=dtype))
    for found in one_key(every, dtype):
        assert torch.equal(found, every.flatten()), (NAME, dtype)
    fine = torch.randn(64, 24) * torch.logspace(-9, 4, 64)[:, None]  # subnormal numbers of fp16, and nearly its largest
    for found in one_key(fine, dtype):
        assert torch.equal(found, fine.to(dtype).flatten()), (NAME, dtype)
print("exact")
"""


def limited_to(name: str) -> dict[str, str]:
    """torch's variable, which its own kernels obey too."""
    return {**os.environ, "ATEN_CPU_CAPABILITY": {"baseline": "default"}.get(name, name), "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["baseline", "avx2", "avx512"])
def test_numbers_of_16_bits_are_read_and_rounded_exactly(name: str, native: ModuleType) -> None:
    """The weight of a row's only key is 1, so o is its value."""
    if name == "avx512" and native.instruction_set() != name:
        pytest.skip(f"this processor has {native.instruction_set()}")
    command = [sys.executable, "-c", EXACT.replace("NAME", repr(name))]
    ran = subprocess.run(command, env=limited_to(name), cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert ran.stdout == "exact\n", ran.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", ["baseline", "avx2"])
def test_smaller_instruction_sets_are_right(name: str) -> None:
    """The tests of accuracy, by the kernels that other processors run."""
    tests = ["tests/operator/test_accuracy.py", "-k", "native and (fp32 or error_rule or odd_shapes)"]
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", *tests]
    asked = "from fastprefix import _extension; print(_extension.load().module.instruction_set())"
    told = subprocess.run([sys.executable, "-c", asked], env=limited_to(name), cwd=ROOT, capture_output=True, text=True)
    if told.stdout != f"{name}\n":
        pytest.skip(f"this processor has {told.stdout}")
    ran = subprocess.run(command, env=limited_to(name), cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert ran.returncode == 0 and " passed" in ran.stdout, ran.stdout[-3000:]


def test_a_nan_that_is_seen_is_not_lost() -> None:
    for S, T, P in ((1, 9, 4), (40, 40, 4), (1, 9, 500)):
        for name in ("q", "k", "v", "prefix_k", "prefix_v"):
            call = make_call(B=2, S=S, T=T, P=P, D=16)
            leaf = call.leaves[name].detach().clone()
            leaf[..., 0, :] = float("nan")
            call.leaves[name] = leaf
            o = prefix_attention(**{n: x.detach() for n, x in call.leaves.items()}, backend="native")
            assert o[:, :, 0].isnan().all(), (S, name)
