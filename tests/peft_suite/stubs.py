"""What PEFT's test modules import and the selected tests hardly touch, and the one data set that they read.

Installed for names at the top of a file, datasets, diffusers and scipy would be half a gigabyte.
"""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import numpy as np

_QUOTES = [
    "A prefix is read by every row and written by none.",
    "What is measured once is a rumour; what is measured twice is a number.",
    "The shortest path through a long text is the one already in the cache.",
    "Do not copy what you can point at.",
    "Be patient with the slow ones, they may be computing the gradient.",
    "A mask says who may look; a position says from where.",
]


class Rows(list[dict[str, Any]]):
    """As much of a data set as a Trainer and PEFT's tests ask for."""

    def map(self, function: Callable[[dict[str, Any]], dict[str, Any]], batched: bool = False, **_: Any) -> Rows:
        """Each row with the columns that ``function`` returns added."""
        if not batched:
            return Rows({**row, **function(row)} for row in self)
        columns = function({key: [row[key] for row in self] for key in self[0]})
        return Rows({**row, **{key: values[i] for key, values in columns.items()}} for i, row in enumerate(self))


class Splits(dict[str, Rows]):
    """Rows by split."""

    def map(self, function: Callable[..., Any], **options: Any) -> Splits:
        """``Rows.map`` of every split."""
        return Splits({name: rows.map(function, **options) for name, rows in self.items()})


def load_dataset(name: str, *args: Any, **kwargs: Any) -> Any:
    """The two that are asked for by name: quotes to train on, and an image that is only read at import."""
    if "quotes" in name:
        return Splits(train=Rows({"quote": quote, "author": "-"} for quote in _QUOTES * 4))
    if name == "huggingface/cats-image":
        return {"test": {"image": [np.zeros((8, 8, 3), dtype=np.uint8)]}}
    raise OSError(f"{name}: no data set stands in for it")


def _module(name: str, **names: Any) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError:
        module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)  # without it, find_spec raises
    module.__dict__.update(names)
    sys.modules[name] = module
    return module


def install() -> None:
    """Before PEFT's tests are imported, after transformers has looked for the real ones."""
    from transformers import trainer  # noqa: F401
    from transformers.utils import is_datasets_available, is_scipy_available

    is_datasets_available()
    is_scipy_available()
    _module("datasets").load_dataset = load_dataset  # type: ignore[attr-defined]
    _module("diffusers", StableDiffusionPipeline=type("StableDiffusionPipeline", (), {}))
    _module("scipy", stats=_module("scipy.stats"))
    _module("attr", dataclass=dataclasses.dataclass)  # PEFT imports it for CorDA without requiring it
