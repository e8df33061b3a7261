"""Sharded parameters (DTensors of FSDP2 or tensor parallelism): where they are refused, and how they are gathered."""

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
    """Raise ValueError for a sharded model, in which each device would hold a different, unsharded prefix."""
    found = next((name for name, p in model.named_parameters() if is_sharded(p)), None)
    if found is not None:
        got = f"{type(model).__name__} with sharded parameters ({found} is a DTensor)"
        expected = "a whole model: attach first and fully_shard then; tensor parallel models cannot carry a prefix"
        raise fail("model", got, expected)


def refuse_bank(parameters: Iterable[Tensor]) -> None:
    """Raise ValueError where these parameters are sharded: a bank needs them before their layers gather them."""
    if any(is_sharded(p) for p in parameters):
        expected = "one prefix for all rows, attached and active: no soft prompts, shared prompts or mixed batches"
        raise fail("model", "one with sharded parameters (FSDP2, tensor parallelism)", expected)


@contextmanager
def gathered(prefix: nn.Module) -> Iterator[bool]:
    """Replace a prefix's shards by whole parameters inside the block; yields whether this process should write them.

    If the parameters are sharded, every process has to enter the block, and all leave it together.
    """
    prefix.state_dict()  # makes FSDP2 reshard parameters that a forward without a backward left gathered
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
