"""Sharded parameters (DTensors of FSDP2 or tensor parallelism): where they are refused, and how they are gathered.

In a tensor-parallel model of transformers (``tp_plan``) every process runs the whole text through some of the attention
heads. A prefix is spread over the processes in the same way (:mod:`fastprefix.prefixes.head_shards`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastprefix.errors import fail
from fastprefix.prefixes.head_shards import HeadShards

if torch.distributed.is_available():
    from torch.distributed.tensor import DTensor


def is_sharded(x: Any) -> bool:
    """Whether a tensor is a DTensor."""
    return torch.distributed.is_available() and isinstance(x, DTensor)


def _first_sharded(model: nn.Module) -> str | None:
    return next((name for name, p in model.named_parameters() if is_sharded(p)), None)


def refuse(model: nn.Module) -> None:
    """Raise ValueError for a sharded model, by FSDP2 or by tensor parallelism."""
    found = _first_sharded(model)
    if found is not None:
        got = f"{type(model).__name__} with sharded parameters ({found} is a DTensor)"
        raise fail("model", got, "a whole model on each device; for training, attach first and fully_shard then")


def is_tensor_parallel(model: Any) -> bool:
    """Whether transformers has spread a model's layers over processes (``tp_plan``)."""
    return (getattr(model, "_tp_size", None) or 1) > 1 and _first_sharded(model) is not None


def refuse_tensor_parallel(model: Any) -> None:
    """Raise ValueError for a tensor-parallel model."""
    if isinstance(model, nn.Module) and is_tensor_parallel(model):
        raise fail("model", f"a tensor-parallel {type(model).__name__}", "a whole model on each device")


def refuse_uneven_heads(model: Any) -> None:
    """Raise ValueError where a tensor-parallel model's processes cannot have as many heads of keys each.

    A forward of transformers fails there, on shapes; this gives the reason for that.
    """
    if is_tensor_parallel(model):
        config = model.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or getattr(config, "num_attention_heads", None)
        if isinstance(heads, int) and heads % model._tp_size:
            got = f"{type(model).__name__} with {heads} heads of keys and values over {model._tp_size} processes"
            expected = f"a tp_size that divides {heads}: transformers' own forward fails"
            raise fail("model", got, expected)


def tensor_parallel_mesh(model: Any) -> Any:
    """The processes over which transformers has spread a model's layers (``tp_plan``); None for a whole model.

    Raises:
        ValueError: the model is sharded in another way, alone or together with tensor parallelism: each device would
            hold a different, unsharded prefix.
    """
    found = _first_sharded(model)
    if found is None:
        return None
    meshes = {p.device_mesh for p in model.parameters() if is_sharded(p)}
    config = getattr(model.config, "distributed_config", None)
    others = [name for name in ("dp", "pp", "ep") if (getattr(config, f"{name}_size", None) or 1) > 1]
    if is_tensor_parallel(model) and len(meshes) == 1 and not others:
        mesh = meshes.pop()
        if mesh.ndim == 1 and mesh.size() == model._tp_size:
            return mesh
    kinds = "".join(f", {name}_size > 1" for name in others)
    got = f"{type(model).__name__} with sharded parameters ({found} is a DTensor{kinds})"
    expected = "a whole model, which fully_shard then shards, or one that is tensor parallel alone (tp_plan)"
    raise fail("model", got, expected)


def refuse_bank(parameters: Iterable[Tensor], shards: HeadShards | None) -> None:
    """Raise ValueError where these parameters are sharded: a bank needs them before their layers gather them.

    ``shards``: how a tensor-parallel model's heads are spread. Those of a bank are read without gathering.
    """
    if any(is_sharded(p) and (shards is None or p.device_mesh != shards.mesh) for p in parameters):  # type: ignore[attr-defined]
        expected = "one prefix for all rows, attached and active: no soft prompts, shared prompts or mixed batches"
        raise fail("model", "one with sharded parameters (FSDP2)", expected)


@contextmanager
def gathered(prefix: nn.Module, together: bool = False) -> Iterator[bool]:
    """Replace a prefix's shards by whole parameters inside the block; yields whether this process should write them.

    If anything is sharded, every process has to enter the block, and all leave it together; so they do where they
    train one prefix ``together``, of which each may have all numbers.
    """
    prefix.state_dict()  # makes FSDP2 reshard parameters that a forward without a backward left gathered
    tables: list[dict[str, Any]] = [t for m in prefix.modules() for t in (m._parameters, m._buffers)]
    shards = [(table, name, x) for table in tables for name, x in table.items() if is_sharded(x)]
    if not shards and not together:
        yield True
        return
    for table, name, shard in shards:
        whole = shard.full_tensor().detach()
        table[name] = nn.Parameter(whole, requires_grad=False) if isinstance(shard, nn.Parameter) else whole
    try:
        yield torch.distributed.get_rank() == 0
    finally:
        for table, name, shard in shards:
            table[name] = shard
        torch.distributed.barrier()
