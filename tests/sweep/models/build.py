"""A tiny random model of a class, in fp64, its weights large enough that attention matters."""

from __future__ import annotations

import contextlib
import copy
import weakref
from typing import Any

import torch

from tests.sweep.models.tiny_configs import tiny

# Larger than this is not tiny: a size of its config escaped the shrinking.
MOST_PARAMETERS = 24_000_000


_as_built: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


class NotBuilt(Exception):
    """A class of which no tiny model can be made, and why."""


def build(cls: Any, fields: dict[str, Any] | None = None) -> Any:
    """The model in eval mode, with eager attention; ``fields``: of a variant of its config. Raises NotBuilt."""
    try:
        config = tiny(cls.config_class, fields)
    except Exception as error:
        raise NotBuilt(f"config: {_line(error)}") from error
    try:
        with torch.device("meta"):
            count = sum(p.numel() for p in cls(config).parameters())
    except Exception:
        count = 0  # some make numbers of their weights when built
    if count > MOST_PARAMETERS:
        raise NotBuilt(f"size: {count} parameters")
    torch.manual_seed(0)
    try:
        model = cls(tiny(cls.config_class, fields))
    except Exception as error:
        raise NotBuilt(f"model: {_line(error)}") from error
    count = sum(p.numel() for p in model.parameters())
    if count > MOST_PARAMETERS:
        raise NotBuilt(f"size: {count} parameters")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.is_floating_point():
                continue
            if parameter.dim() > 1:
                parameter.normal_(std=0.15)
            elif "norm" not in name.lower() and "ln" not in name.lower():
                parameter.normal_(std=0.05)
    for module in model.modules():  # the grouped product has no fp64
        if hasattr(module, "config"):
            module.config._experts_implementation = "eager"
    # What is not the prefix takes no gradient: a result that takes one depends on it.
    model = model.to(torch.float64).eval().requires_grad_(False)
    bare = copy.deepcopy(model)
    with contextlib.suppress(Exception):
        bare.set_attn_implementation("eager")
    _as_built[bare] = model
    return bare


def as_built(bare: Any) -> Any:
    """A copy of the model with the attention that users get, mostly SDPA.

    The oracles run eager attention: transformers' SDPA leaves softcaps out, and takes a mask that hides nothing for a
    causal one.
    """
    return copy.deepcopy(_as_built[bare])


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
