"""Parameters in pieces on many devices (DTensors: FSDP2, tensor parallelism): how they are read and where refused."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastprefix.errors import fail

if torch.distributed.is_available():
    from torch.distributed.tensor import DTensor


def is_sharded(x: Any) -> bool:
    """Whether a tensor is a DTensor."""
    return torch.distributed.is_available() and isinstance(x, DTensor)


def refuse(model: nn.Module) -> None:
    """Raise ValueError for a model that is sharded already: a new prefix would be whole on every device, and differ."""
    found = next((name for name, p in model.named_parameters() if is_sharded(p)), None)
    if found is not None:
        got = f"{type(model).__name__} with sharded parameters ({found} is a DTensor)"
        expected = "a whole model: attach first and fully_shard then; tensor parallel models cannot carry a prefix"
        raise fail("model", got, expected)


def refuse_bank(parameters: Iterable[Tensor]) -> None:
    """Raise ValueError where what is read before the layers run is computed from shards, which each layer gathers."""
    if any(is_sharded(p) for p in parameters):
        expected = "one prefix for all rows, attached and active: no soft prompts, shared prompts or mixed batches"
        raise fail("model", "one with sharded parameters (FSDP2, tensor parallelism)", expected)


@contextmanager
def gathered(prefix: nn.Module) -> Iterator[bool]:
    """A prefix with whole parameters inside the block, and whether this process is the one to write them.

    Where they are sharded every process has to enter, and leaves when all have.
    """
    prefix.state_dict()  # has FSDP2 shard again what a forward without a backward has left whole
    shards: list[tuple[nn.Module, str, Any]] = [
        (m, n, p) for m in prefix.modules() for n, p in m._parameters.items() if is_sharded(p)
    ]
    if not shards:
        yield True
        return
    for module, name, shard in shards:
        module._parameters[name] = nn.Parameter(shard.full_tensor().detach(), requires_grad=False)
    try:
        yield torch.distributed.get_rank() == 0
    finally:
        for module, name, shard in shards:
            module._parameters[name] = shard
        torch.distributed.barrier()
