"""Two processes on this machine, joined by gloo, for what trainers spread over many."""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

WORLD = 2
# Imported once, in the process that the others are forked from.
PRELOADED = ["torch.distributed.fsdp", "transformers.models.llama.modeling_llama", "accelerate", "fastprefix"]


def run(worker: Callable[..., Any], folder: Path, *args: Any, timeout: float = 120.0) -> list[Any]:
    """What ``worker(rank, *args)``, a module's function, returns in each process; fails with its traceback."""
    context = torch.multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOADED, worker.__module__])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [context.Process(target=_start, args=(worker, rank, port, folder, args)) for rank in range(WORLD)]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(timeout)
    finally:
        hanging = [process for process in processes if process.is_alive()]
        for process in hanging:
            process.kill()
    errors = [path.read_text() for path in sorted(folder.glob("error-*.txt"))]
    assert not errors, "\n".join(errors)
    assert not hanging, f"{len(hanging)} of {WORLD} processes still ran after {timeout} s"
    return [torch.load(folder / f"result-{rank}.pt", weights_only=False) for rank in range(WORLD)]


def _start(worker: Callable[..., Any], rank: int, port: int, folder: Path, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    try:
        torch.distributed.init_process_group("gloo", rank=rank, world_size=WORLD)
        torch.save(worker(rank, *args), folder / f"result-{rank}.pt")
        torch.distributed.destroy_process_group()
    except BaseException:
        (folder / f"error-{rank}.txt").write_text(traceback.format_exc())
        os._exit(1)  # without waiting for a process that waits for this one
