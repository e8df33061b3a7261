"""Wrappers around a model: finds the model inside, and names the wrappers that cannot be used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from fastprefix.errors import fail

_FLAT = "FullyShardedDataParallel"  # FSDP1, compared by name as its import is slow
# Wrappers that have collected the parameters already, so that none can be added.
ADDING = {
    DistributedDataParallel.__name__: "the model itself, and DistributedDataParallel around it afterwards: it does not "
    "average gradients of parameters that come later",
    AveragedModel.__name__: "the model itself, and AveragedModel around it afterwards: it knows parameters by order",
    _FLAT: "the model itself, and fully_shard (FSDP2) afterwards",
}
# The same, of which no parameters can be taken.
REMOVING = {
    DistributedDataParallel.__name__: "the model itself, and DistributedDataParallel around it afterwards: it waits "
    "for the gradients of all parameters that it has collected",
    AveragedModel.__name__: ADDING[AveragedModel.__name__],
    _FLAT: "the model itself, and fully_shard (FSDP2) afterwards",
}
SAVING = {_FLAT: "a model sharded by fully_shard (FSDP2): FSDP1 has flattened what is to be saved"}


def unwrapped(model: Any, but: Mapping[str, str] | None = None) -> Any:
    """The model inside DataParallel, DistributedDataParallel, AveragedModel, FSDP1 and ``torch.compile``.

    Args:
        model: any object.
        but: class names of wrappers to refuse, each with the text of what is expected instead.

    Raises:
        ValueError: the model is in one of the refused wrappers; its name is given.
    """
    while isinstance(model, nn.Module):
        name = type(model).__name__
        if but is not None and name in but:
            raise fail("model", f"a {name} around it", but[name])
        if isinstance(model, DataParallel | DistributedDataParallel | AveragedModel) or name == _FLAT:
            model = model.module
        elif "_orig_mod" in model._modules:
            model = model._orig_mod
        else:
            break
    return model


def hint(model: Any) -> str:
    """A hint for an error: the attribute in which an object holds a transformers model; empty without one."""
    from transformers import PreTrainedModel

    if not isinstance(model, nn.Module) or isinstance(model, PreTrainedModel):
        return ""
    if hasattr(model, "get_base_model"):
        return "; a PeftModel holds one: model.get_base_model()"
    inside = (name for name, child in model.named_modules() if isinstance(child, PreTrainedModel))
    found = next(inside, None)
    return "" if found is None else f"; a {type(model).__name__} holds one: model.{found}"


def refuse_flat(model: nn.Module, prefix: nn.Module) -> None:
    """Raise ValueError where FSDP1 has flattened a prefix's parameters, which leaves them stale or empty."""
    left = list(prefix.parameters())
    if not left or any(getattr(p, "_fsdp_flattened", False) for p in left):
        raise fail("model", f"a {type(model).__name__} of {_FLAT}", SAVING[_FLAT])
