"""Each fault of a kernel that the emulator names is found, and a kernel without it is clean."""

from __future__ import annotations

import ctypes
import re

import pytest
import torch

from tests.emulator.build import library
from tests.emulator.session import Mode, Session

# A compiler runs.
pytestmark = pytest.mark.slow
# Which copies arrive when, and who runs first, may not matter.
WAYS = {
    "late": {"mode": Mode.LATE},
    "eager": {"mode": Mode.EAGER},
    "random": {"mode": Mode.RANDOM, "seed": 1},
    "workers": {"mode": Mode.RANDOM, "seed": 2, "workers": 3},
}
IN_FLIGHT = r"shared word \d+ while an asynchronous copy to it is in flight"
OTHER_WARP = r"warp \d+ without a barrier between"
OTHER_LANE = "another lane of the warp without a sync_warp between"
FAULTS = {
    "no_wait": f"ld_shared reads {IN_FLIGHT}",
    "wait_for_too_few": f"ld_shared reads {IN_FLIGHT}",
    "exit_in_flight": "exit with cp_async in flight",
    "overwritten_in_flight": f"st_shared writes {IN_FLIGHT}",
    "copy_of_8_bytes": "cp_async of 8 bytes",
    "no_barrier_before_reading": rf"race: ld_shared reads shared word \d+, written by {OTHER_WARP}",
    "no_barrier_before_writing": rf"race: st_shared writes shared word \d+, which may still be read by {OTHER_WARP}",
    "two_warps_write": rf"race: st_shared writes shared word \d+, written by {OTHER_WARP}",
    "two_lanes_write": rf"race: st_shared writes shared word \d+, written by {OTHER_LANE}",
    "lane_reads_without_sync": rf"race: ld_shared reads shared word \d+, written by {OTHER_LANE}",
    "lane_writes_without_sync": rf"race: st_shared writes shared word \d+, which may still be read by {OTHER_LANE}",
    "ldmatrix_without_sync": rf"race: ldmatrix_x4 reads shared word \d+, written by {OTHER_LANE}",
    "never_written": r"ld_shared reads shared word \d+ that nothing wrote",
    "half_a_warp": r"16 threads have exited \(the first is 16\), 16 threads wait at shfl_xor \(the first is 0\)",
    "divergent": "divergent warp: (shfl_xor meets sync_warp|sync_warp meets shfl_xor)",
    "exit_before_barrier": "deadlock: nobody can run; 24 threads have exited .* 40 threads wait at sync_block",
    "barrier_in_half_a_warp": "deadlock: nobody can run; 16 threads wait at sync_block .* 16 threads wait at sync_warp",
    "read_past_end": r"ld_global of 4 bytes outside global memory: in \+ 1024, which has 1024 bytes",
    "write_past_end": r"st_global of 4 bytes outside global memory: out \+ 1024, which has 1024 bytes",
    "copy_past_end": r"cp_async of 16 bytes outside global memory: in \+ 1024, which has 1024 bytes",
    "write_to_read_only": "st_global writes to in, which is read-only",
    "misaligned_global": "ld_global of 16 bytes is misaligned in global memory",
    "two_blocks_write": r"two blocks write out \+ \d+ in the same launch",
    "two_threads_write": r"two threads of a block write out \+ \d+ in the same launch",
    "block_reads_another": r"ld_global reads out \+ \d+, which another block writes in the same launch"
    r"|st_global writes out \+ \d+, which another block reads in the same launch",
    "output_never_written": r"ld_global reads out \+ \d+ that nothing wrote",
    "misaligned_ldmatrix": "ldmatrix_x4 of 16 bytes is misaligned in shared memory",
    "outside_shared": "st_shared of 4 bytes outside shared memory: byte 4096 of 4096",
    "too_much_shared": "more than 232448 bytes of shared memory a block: 232449",
    "too_many_threads": "more than 1024 threads a block: 1056",
    "no_whole_warps": "threads are no whole warps: 48",
}


@pytest.fixture(scope="module")
def session() -> Session:
    session = Session(library("tests/emulator/faults.cpp", extra_flags=("-O0",)))
    session.library.run_case.restype = ctypes.c_char_p
    session.library.run_case.argtypes = [ctypes.c_char_p, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]
    return session


def run_case(session: Session, name: str, broken: bool, **options: int) -> str | None:
    """What the launch answers."""
    out, given = torch.zeros(256), torch.rand(256)
    session.reset(**options)
    session.add("out", out, writable=True)
    session.add("in", given)
    answer = session.library.run_case(name.encode(), broken, out.data_ptr(), given.data_ptr())
    assert (answer is None) == (session.errors == [])
    return None if answer is None else answer.decode()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_named(session: Session, name: str, way: str) -> None:
    assert run_case(session, name, False, **WAYS[way]) is None, session.errors
    assert run_case(session, name, True, **WAYS[way]) == session.errors[0]
    # Not always the first: a thread that reads too early may find what nothing wrote yet.
    assert any(re.search(FAULTS[name], error) for error in session.errors), session.errors


def test_every_launch_answers_though_an_error_is_kept_once(session: Session) -> None:
    out = torch.zeros(256)
    session.reset()
    session.add("out", out, writable=True)
    for number in (1, 2):
        answer = session.library.run_case(b"write_past_end", True, out.data_ptr(), None)
        assert answer.startswith(b"launch %d, block 0, thread 31: " % number)
    assert len(session.errors) == 1


def test_races_need_not_be_looked_for(session: Session) -> None:
    assert run_case(session, "two_warps_write", True, races=False) is None
    assert run_case(session, "no_wait", True, races=False) is None
