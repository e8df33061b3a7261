"""What each instruction computes, against the tables of the PTX ISA manual, numpy and torch."""

from __future__ import annotations

import ctypes
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.emulator.build import library
from tests.emulator.session import Mode, Session

# A compiler runs.
pytestmark = pytest.mark.slow
NAN = float("nan")
INF = float("inf")


@pytest.fixture(scope="module", params=["assembly", "ucontext"])
def session(request: pytest.FixtureRequest) -> Session:
    """With both ways to switch between threads; on other processors than x86-64 they are the same."""
    if request.param == "assembly":
        return Session(library("tests/emulator/values.cpp"))
    return Session(library("tests/emulator/values.cpp", defines=("FASTPREFIX_UCONTEXT=1",), extra_flags=("-O0",)))


def launch(session: Session, kernel: str, *arguments: Tensor | int, outputs: int = 1, blocks: int = 1) -> None:
    """Runs a kernel whose parameters are these. As many of the last tensors as ``outputs`` says are written."""
    fields: list[Any] = []
    for i, x in enumerate(arguments):
        if isinstance(x, Tensor):
            session.add(f"argument {i}", x, writable=i >= len(arguments) - outputs)
        fields.append((f"x{i}", ctypes.c_void_p if isinstance(x, Tensor) else ctypes.c_int))
    params = type("Params", (ctypes.Structure,), {"_fields_": fields})(
        *(x.data_ptr() if isinstance(x, Tensor) else x for x in arguments)
    )
    function = session.library[kernel]
    function.restype = ctypes.c_char_p
    answer = function(ctypes.byref(params), blocks)
    assert answer is None, session.errors


def bits(x: Tensor) -> np.ndarray:
    return x.view(torch.int16).numpy().view(np.uint16)


def registers(matrix: np.ndarray, places: list[list[tuple[int, int]]]) -> Tensor:
    """Pairs of a matrix's 16-bit elements: [lanes, pairs], the even element in the low half."""
    elements = np.array([[matrix[place] for place in lane] for lane in places], np.uint16)
    return torch.from_numpy(elements.view(np.int32).copy())


# PTX ISA, "Matrix fragments for mma.m16n8k16 with floating point type": the place of element i of a lane.
def place_in_a(lane: int, i: int) -> tuple[int, int]:
    row = lane // 4 if i < 2 or 4 <= i < 6 else lane // 4 + 8
    return row, lane % 4 * 2 + (i & 1) + (8 if i >= 4 else 0)


def place_in_b(lane: int, i: int) -> tuple[int, int]:
    return lane % 4 * 2 + (i & 1) + (8 if i >= 2 else 0), lane // 4


def place_in_c(lane: int, i: int) -> tuple[int, int]:
    return (lane // 4 if i < 2 else lane // 4 + 8), lane % 4 * 2 + (i & 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mma(session: Session, dtype: torch.dtype) -> None:
    session.reset()
    a, b, c = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype), torch.randn(16, 8)
    a_registers = registers(bits(a), [[place_in_a(lane, i) for i in range(8)] for lane in range(32)])
    b_registers = registers(bits(b), [[place_in_b(lane, i) for i in range(4)] for lane in range(32)])
    rows, columns = np.array([[place_in_c(lane, i) for i in range(4)] for lane in range(32)]).transpose(2, 0, 1)
    got = torch.empty(32, 4)
    kernel = "mma_bf16" if dtype == torch.bfloat16 else "mma_f16"
    launch(session, kernel, a_registers, b_registers, c[rows, columns].contiguous(), got)
    expected = c.double() + a.double() @ b.double()
    torch.testing.assert_close(got.double(), expected[rows, columns], rtol=1e-6, atol=1e-5)
    assert session.counters.mma == 1


@pytest.mark.parametrize("trans", [False, True])
def test_ldmatrix(session: Session, trans: bool) -> None:
    """Lane i names row i % 8 of matrix i / 8. Of that matrix, or its transpose, a lane gets a pair of row lane / 4."""
    session.reset()
    rows = torch.arange(64 * 8, dtype=torch.int16).reshape(64, 8)
    named = torch.randperm(64)[:32].int()
    got = torch.empty(32, 4, dtype=torch.int32)
    launch(session, "ldmatrix_trans" if trans else "ldmatrix", rows, 64, named, got)
    matrices = rows[named.long()].reshape(4, 8, 8)
    if trans:
        matrices = matrices.transpose(1, 2)
    # [lanes, matrices, the pair]
    expected = matrices.reshape(4, 32, 2).transpose(0, 1)
    assert torch.equal(got.view(torch.int16).reshape(32, 4, 2), expected)


def test_bank_conflicts_of_ldmatrix_are_counted(session: Session) -> None:
    """The 8 rows of a matrix are read at once if their 16-byte chunks lie in 8 different places of 128 bytes."""
    rows, got = torch.zeros(512, 8, dtype=torch.int16), torch.empty(32, 4, dtype=torch.int32)
    lanes = torch.arange(32, dtype=torch.int32)
    for named, conflicts in {lanes: 0, lanes * 8: 4 * 7, lanes * 8 + lanes % 8: 0, lanes * 4: 4 * 3}.items():
        session.reset()
        launch(session, "ldmatrix", rows, 512, named, got)
        assert session.counters.bank_conflicts == conflicts


def test_shuffles(session: Session) -> None:
    session.reset()
    x, integers, lanes = torch.randn(32), torch.randint(-99, 99, (32,)).int(), torch.arange(32)
    outputs = torch.empty(32), torch.empty(32), torch.empty(32, dtype=torch.int32), torch.empty(32, dtype=torch.int32)
    launch(session, "shuffles", x, integers, *outputs, outputs=4)
    up = torch.where(lanes >= 3, integers.roll(3), integers)
    for got, expected in zip(outputs, (x[lanes ^ 5], x.flip(0), integers[[7] * 32], up)):
        assert torch.equal(got, expected)


def test_a_copy_is_nan_until_its_wait_or_comes_at_once(session: Session) -> None:
    """Only without races does a kernel get to see the difference."""
    x, before, after = torch.rand(256), torch.empty(64), torch.empty(64)
    expected = torch.cat([x[3:252:4], torch.zeros(1)])
    early = {}
    for mode in Mode:
        session.reset(mode=mode, seed=1, races=False)
        launch(session, "copies", x, before, after, outputs=2)
        assert torch.equal(after, expected)
        early[mode] = int((before == torch.cat([x[0:252:4], torch.zeros(1)])).sum())
        assert int(before.isnan().sum()) == 64 - early[mode]
    assert early[Mode.LATE] == 0 and early[Mode.EAGER] == 64 and 10 < early[Mode.RANDOM] < 54


def test_types_in_shared_memory(session: Session) -> None:
    session.reset()
    out = torch.empty(32, 2)
    launch(session, "types", out)
    assert torch.equal(out, torch.tensor([10.0, 0x3F800000]).expand(32, 2))


def test_a_variable_that_nothing_sets_is_far_off(session: Session) -> None:
    session.reset()
    out = torch.empty(32)
    launch(session, "unset", out)
    assert bool((out.abs() > 1e30).all())


# Every ending of a mantissa that rounding can meet, with numbers that only infinity, NaN or denormals stand for.
ODD = [0.0, -0.0, INF, -INF, 65504.0, 65519.0, 65520.0, -65536.0, 3.4e38, 3.39e38, 6e-8, 2.9e-8, 6.1e-5, 1e-40, -1e-45]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_pack_rounds_as_torch_does(session: Session, dtype: torch.dtype) -> None:
    patterns = torch.randint(-(2**31), 2**31, (20000,), dtype=torch.int64).int()
    ties = (patterns[:5000] & ~0x1FFF) | 0x1000
    x = torch.cat([patterns, ties]).view(torch.float32)
    x = torch.cat([x, torch.randn(20000), torch.tensor([*ODD, NAN])])
    got = torch.empty(len(x) // 2, dtype=torch.int32)
    name = "bf16" if dtype == torch.bfloat16 else "f16"
    pointers = ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(got.data_ptr())
    session.library[f"pack_{name}"](*pointers, ctypes.c_int64(len(got)))
    torch.testing.assert_close(got.view(dtype), x.to(dtype), rtol=0, atol=0, equal_nan=True)
    everything = torch.empty(65536)
    session.library[f"widen_{name}"](ctypes.c_void_p(everything.data_ptr()))
    expected = torch.arange(65536).to(torch.uint16).view(dtype).float()
    torch.testing.assert_close(everything, expected, rtol=0, atol=0, equal_nan=True)


def test_ex2_and_lg2_flush_denormals(session: Session) -> None:
    exp2, log2 = session.library["exp2_of"], session.library["log2_of"]
    for function in (exp2, log2):
        function.restype, function.argtypes = ctypes.c_float, [ctypes.c_float]
    for x, expected in {-INF: 0.0, INF: INF, 0.0: 1.0, -126.0: 2.0**-126, -127.0: 0.0, 1e-40: 1.0, 3.0: 8.0}.items():
        assert exp2(x) == expected
    for x, expected in {0.0: -INF, 1e-40: -INF, INF: INF, 2.0**-126: -126.0, 8.0: 3.0}.items():
        assert log2(x) == expected
    assert math.isnan(exp2(NAN)) and math.isnan(log2(-1.0))


def test_blocks_and_warps_run_in_an_order_of_the_seed(session: Session) -> None:
    orders = {}
    for seed in (0, 0, 1, 1, 2):
        session.reset(seed=seed)
        order, count = torch.full((40,), -1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
        launch(session, "order", order, count, blocks=10)
        assert order.sort().values.tolist() == list(range(40))
        assert orders.setdefault(seed, order.tolist()) == order.tolist()
        assert session.counters.blocks == 10
    assert orders[0] == list(range(40))
    blocks = [[warp // 4 for warp in orders[seed][::4]] for seed in (1, 2)]
    assert blocks[0] != blocks[1] and sorted(blocks[0]) == list(range(10)) != blocks[0]
    assert any(orders[1][i] != orders[1][0] // 4 * 4 + i for i in range(4))


def test_multiprocessors_are_an_option(session: Session) -> None:
    session.reset(multiprocessors=7)
    assert session.library.multiprocessors_of_session() == 7
