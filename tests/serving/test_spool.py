"""The files that workers read, and which of them stay in memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastprefix.serving.vllm.geometry import heads_of
from fastprefix.serving.vllm.spool import LOCK, Resident, Spool

KILLED = """
import os, signal, sys, torch
from pathlib import Path
from fastprefix.serving.vllm.spool import Spool
spool = Spool(Path(sys.argv[1]))
spool.put("d", {"k.0": torch.zeros(1, 2, 3)})
print(spool.folder, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def tensors(layers: int = 2, heads: int = 4) -> dict[str, torch.Tensor]:
    shape = heads, 3, 8
    return {f"{n}.{i}": torch.randn(shape) for n in "kv" for i in range(layers)}


def test_a_file_is_written_once_and_goes_with_the_spool(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    path = spool.put("a", tensors())
    before = path.stat().st_mtime_ns
    assert spool.put("a", tensors()) == path and path.stat().st_mtime_ns == before
    assert {x.name for x in spool.folder.iterdir()} == {LOCK, "a.safetensors"}
    spool.close()
    assert not spool.folder.exists() and not list(tmp_path.iterdir())


def test_the_folder_of_a_killed_server_is_removed_by_the_next_and_that_of_a_living_one_is_not(tmp_path: Path) -> None:
    living = Spool(tmp_path)
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], capture_output=True, text=True)
    killed = Path(done.stdout.strip())
    assert done.returncode == -9 and killed.is_dir()
    third = Spool(tmp_path)
    assert not killed.exists() and living.folder.is_dir() and third.folder.is_dir()
    living.close()
    third.close()


def test_the_least_recently_used_prefix_leaves_memory(tmp_path: Path) -> None:
    spool, resident = Spool(tmp_path), Resident(2)
    paths = [str(spool.put(name, tensors())) for name in "abc"]
    layers, all_heads = {0: None, 1: None}, slice(None)
    first = resident.get(paths[0], layers, all_heads)
    resident.get(paths[1], layers, all_heads)
    assert resident.get(paths[0], layers, all_heads) is first  # now the last used
    resident.get(paths[2], layers, all_heads)
    assert len(resident) == 2 and resident.get(paths[0], layers, all_heads) is first
    spool.close()
    assert resident.get(paths[0], layers, all_heads) is first
    with pytest.raises((OSError, ValueError)):
        resident.get(paths[1], layers, all_heads)


@pytest.mark.parametrize(("size", "heads"), [(1, 4), (2, 4), (4, 4), (8, 4), (4, 1), (2, 6)])
def test_ranks_read_their_heads(tmp_path: Path, size: int, heads: int) -> None:
    """Together the ranks hold all heads in order; with more ranks than heads neighbours hold the same one."""
    spool, whole = Spool(tmp_path), tensors(heads=heads)
    path = str(spool.put("a", whole))
    parts = []
    for rank in range(size):
        found = Resident(1).get(path, {1: None}, heads_of(rank, size, heads))
        assert set(found) == {1}
        parts.append(found[1])
    copies = max(1, size // heads)
    for n, name in enumerate("kv"):
        joined = torch.cat([part[n] for part in parts[::copies]], dim=1)
        assert torch.equal(joined, whole[f"{name}.1"].transpose(0, 1))
        for i in range(size):
            assert torch.equal(parts[i][n], parts[i // copies * copies][n])
    spool.close()


def test_heads_that_no_split_gives_are_refused() -> None:
    with pytest.raises(ValueError, match=r"tensor_parallel_size: got 2, expected a divisor or a multiple of 3 heads"):
        heads_of(0, 2, 3)
