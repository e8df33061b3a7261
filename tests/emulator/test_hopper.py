"""Hopper's instructions: each fault that the emulator names is found, and what they compute is right."""

from __future__ import annotations

import ctypes
import itertools
import re

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.emulator.build import library
from tests.emulator.session import Mode, Session

# A compiler runs.
pytestmark = pytest.mark.slow
WAYS = [
    {"mode": mode, "wgmma_mode": wgmma_mode, "seed": seed}
    for mode, wgmma_mode, seed in (
        (Mode.LATE, Mode.LATE, 0),
        (Mode.EAGER, Mode.LATE, 0),
        (Mode.LATE, Mode.EAGER, 0),
        (Mode.EAGER, Mode.EAGER, 1),
        (Mode.RANDOM, Mode.LATE, 2),
    )
]
BULK_COPY = "a bulk copy without a wait for its mbarrier"
OTHER_WARP = r"warp \d+ without a barrier between"
FAULTS = {
    "no_mbarrier_wait": rf"race: ld_shared reads shared word \d+, written by {BULK_COPY}"
    r"|ld_shared reads shared word \d+ while an asynchronous copy to it is in flight",
    "wait_for_wrong_parity": "deadlock: nobody can run; 32 threads wait at mbarrier_wait",
    "parity_of_two": "mbarrier_wait for parity 2",
    "no_fence_of_init": "tma_load on an mbarrier without fence_mbarrier_init",
    "no_barrier_after_init": rf"race: mbarrier_arrive reads shared word \d+, written by {OTHER_WARP}"
    "|mbarrier_arrive at an address where no mbarrier was initialised",
    "no_init": "mbarrier_arrive at an address where no mbarrier was initialised",
    "too_many_arrivals": "more arrivals at an mbarrier than its count, 1",
    "too_many_bytes_expected": "deadlock: nobody can run; 32 threads wait at mbarrier_wait",
    "released_too_early": rf"race: tma_load writes shared word \d+, which may still be read by {OTHER_WARP}"
    rf"|race: ld_shared reads shared word \d+, written by {BULK_COPY}"
    r"|ld_shared reads shared word \d+ while an asynchronous copy to it is in flight",
    "box_over_stores": r"tma_load writes shared word \d+, written by ordinary stores without fence_proxy_async",
    "exit_before_box": "exit with bulk copies in flight",
    "misaligned_box": "tma_load of 8192 bytes is misaligned in shared memory: byte 128",
    "box_outside_shared": "tma_load of 8192 bytes outside shared memory: byte 32768 of 32768",
    "box_of_wrong_rank": "tma_load_3d with a map of rank 2",
    "unequal_barrier": "bar_sync at barrier 1 with (96|128) threads, where another expects (96|128)",
    "wrong_named_barrier": r"race: (st|ld)_shared (writes|reads) shared word \d+",
    "too_many_registers": "setmaxnreg: a block of 92160 registers, of which there are 65536",
    "no_proxy_fence": r"wgmma reads shared word \d+, written by ordinary stores without fence_proxy_async",
    "no_barrier_before_wgmma": rf"race: wgmma reads shared word \d+, written by {OTHER_WARP}",
    "no_wgmma_fence": "wgmma without wgmma_fence",
    "exit_before_wgmma": "exit with wgmma in flight",
    "accumulator_written_in_flight": "an accumulator was written while its wgmma was in flight",
    "operand_register_written_in_flight": "a register operand was written while its wgmma was in flight",
    "operand_written_in_flight": rf"race: wgmma reads shared word \d+, written by {OTHER_WARP}",
    "operands_that_differ": "wgmma with operands that differ between threads",
    "descriptor_without_swizzle": "wgmma with a descriptor that is not of 128-byte swizzle",
    "divergent_warpgroup": "divergent warpgroup: (wgmma_fence meets wgmma_commit_group|wgmma_commit_group meets)",
}


@pytest.fixture(scope="module")
def session() -> Session:
    session = Session(library("tests/emulator/hopper.cpp", extra_flags=("-O1",)))
    for function in ("run_case", "load_box", "multiply"):
        getattr(session.library, function).restype = ctypes.c_char_p
    return session


def run_case(session: Session, name: str, broken: bool, **options: int) -> str | None:
    out, given = torch.zeros(256), torch.rand(64, 64).half()
    session.reset(**options)
    session.add("out", out, writable=True)
    session.add("in", given)
    pointers = ctypes.c_void_p(out.data_ptr()), ctypes.c_void_p(given.data_ptr())
    answer = session.library.run_case(name.encode(), broken, *pointers)
    assert (answer is None) == (session.errors == [])
    return None if answer is None else answer.decode()


# A copy that comes at once is no longer in flight at the exit.
SEEN_LATE = {"exit_before_box"}


@pytest.mark.parametrize("way", WAYS, ids=lambda way: f"{way['mode'].name}-{way['wgmma_mode'].name}")
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_named(session: Session, name: str, way: dict[str, int]) -> None:
    assert run_case(session, name, False, **way) is None, session.errors
    if name in SEEN_LATE and way["mode"] != Mode.LATE:
        return
    assert run_case(session, name, True, **way) == session.errors[0]
    assert any(re.search(FAULTS[name], error) for error in session.errors), session.errors


class TensorBox(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("rank", ctypes.c_int),
        ("size", ctypes.c_int64 * 5),
        ("stride", ctypes.c_int64 * 5),
        ("box", ctypes.c_int * 5),
        ("swizzle", ctypes.c_bool),
    ]


def load_box(session: Session, x: Tensor, first: list[int], box: list[int], swizzle: bool) -> tuple[Tensor, str | None]:
    """A box as it lies in shared memory, [rows, box[-1]]. ``first`` and ``box`` are in the order of x's dimensions."""
    rank, bytes_ = x.dim(), int(np.prod(box)) * 2
    tensor = TensorBox(x.data_ptr(), rank, swizzle=swizzle)
    for d in range(rank):
        tensor.size[d], tensor.stride[d], tensor.box[d] = x.shape[-1 - d], x.stride(-1 - d), box[-1 - d]
    out = torch.zeros(bytes_ // 4, dtype=torch.int32)
    session.reset()
    session.add("x", x)
    session.add("out", out, writable=True)
    at = (ctypes.c_int * rank)(*reversed(first))
    answer = session.library.load_box(ctypes.byref(tensor), bytes_, at, ctypes.c_void_p(out.data_ptr()))
    return out.view(torch.int16).reshape(-1, box[-1]), answer


@pytest.mark.parametrize("swizzle", [False, True])
@pytest.mark.parametrize("rank", [2, 3, 4, 5])
def test_tma_loads_a_box(session: Session, rank: int, swizzle: bool) -> None:
    """What is outside the tensor, on any side, is 0. Row r of a swizzled box has its chunk c at c ^ r % 8."""
    shape, first, box = [2, 3, 5, 7, 72][-rank:], [-1, 1, 3, -2, 24][-rank:], [2, 2, 2, 5, 64][-rank:]
    x = torch.randint(-30000, 30000, [*shape[:-1], 80], dtype=torch.int16)[..., :72]
    got, answer = load_box(session, x, first, box, swizzle)
    assert answer is None, session.errors
    assert session.counters.tma == 1
    expected = torch.zeros(box, dtype=torch.int16)
    for place in itertools.product(*map(range, box[:-1])):
        at = [f + i for f, i in zip(first, place)]
        if all(0 <= a < size for a, size in zip(at, shape)):
            expected[place][: 72 - 24] = x[tuple(at)][24:]
    rows = expected.reshape(-1, 8, 8)
    if swizzle:
        rows = torch.stack([row[torch.arange(8) ^ r % 8] for r, row in enumerate(rows)])
    assert torch.equal(got.reshape(rows.shape), rows)


def test_a_box_of_memory_that_is_no_buffer_is_an_error(session: Session) -> None:
    x = torch.zeros(8, 64, dtype=torch.int16)
    longer = torch.as_strided(x[:4], (8, 64), (64, 1))
    got, answer = load_box(session, x[:4], [0, 0], [8, 64], True)
    assert answer is None and got.shape == (8, 64)
    session.reset()
    session.add("x", x[:4])
    tensor = TensorBox(longer.data_ptr(), 2, (64, 8), (1, 64), (64, 8), True)
    out = torch.zeros(256, dtype=torch.int32)
    session.add("out", out, writable=True)
    answer = session.library.load_box(ctypes.byref(tensor), 1024, (ctypes.c_int * 2)(), ctypes.c_void_p(out.data_ptr()))
    assert b"tma_load of 128 bytes outside global memory: x + 512, which has 512 bytes" in answer


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"box": [8, 32]}, "a swizzled row of the box has 128 bytes"),
        ({"box": [300, 64]}, "TMA takes boxes of 1 to 256 elements a dimension"),
        ({"box": [8, 12], "swizzle": False}, "TMA needs rows of the box of whole 16 bytes"),
        ({"x": torch.zeros(8, 68, dtype=torch.int16)}, "TMA needs strides that 16 bytes divide"),
        ({"x": torch.zeros(8, 80, dtype=torch.int16)[:, 1:]}, "TMA needs a tensor at an address that 16 divides"),
        ({"x": torch.zeros(80, 80, dtype=torch.int16).T}, "TMA needs an innermost stride of 1"),
    ],
)
def test_what_a_tensor_map_cannot_express(session: Session, change: dict, reason: str) -> None:
    call = {"x": torch.zeros(8, 64, dtype=torch.int16), "first": [0, 0], "box": [8, 64], "swizzle": True} | change
    assert load_box(session, **call)[1] == reason.encode()


@pytest.mark.parametrize("way", WAYS, ids=lambda way: f"{way['mode'].name}-{way['wgmma_mode'].name}")
@pytest.mark.parametrize(
    ("dtype", "n", "a_in_registers", "mn_major"),
    [
        (torch.bfloat16, 128, False, False),
        (torch.bfloat16, 192, True, True),
        (torch.float16, 32, False, True),
        (torch.float16, 16, True, False),
    ],
)
def test_wgmma(
    session: Session, dtype: torch.dtype, n: int, a_in_registers: bool, mn_major: bool, way: dict[str, int]
) -> None:
    a, b, c = torch.randn(64, 64).to(dtype), torch.randn(n, 64).to(dtype), torch.randn(64, n)
    given_b = b.T.contiguous() if mn_major else b
    # PTX ISA, "Register fragments for wgmma.m64nNk16": rows and columns of c's and a's elements.
    thread, i = np.meshgrid(np.arange(128), np.arange(n // 2), indexing="ij")
    rows = thread // 32 * 16 + thread % 32 // 4 + i % 4 // 2 * 8
    columns = i // 4 * 8 + thread % 4 * 2 + i % 2
    step, thread, i = np.meshgrid(np.arange(4), np.arange(128), np.arange(8), indexing="ij")
    a_rows = thread // 32 * 16 + thread % 32 // 4 + np.isin(i, (2, 3, 6, 7)) * 8
    a_columns = step * 16 + thread % 4 * 2 + i % 2 + (i >= 4) * 8
    registers, given_c, got = a[a_rows, a_columns].contiguous(), c[rows, columns].contiguous(), torch.empty(128, n // 2)
    session.reset(**way)
    for name, x in {"a": a, "b": given_b, "registers": registers, "c": given_c}.items():
        session.add(name, x)
    session.add("out", got, writable=True)
    pointers = [ctypes.c_void_p(x.data_ptr()) for x in (a, given_b, registers, given_c, got)]
    if a_in_registers:
        pointers[0] = None
    assert session.library.multiply(dtype == torch.float16, n, mn_major, *pointers) is None, session.errors
    expected = (c.double() + a.double() @ b.double().T)[rows, columns]
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-4)
    assert session.counters.wgmma == 4
