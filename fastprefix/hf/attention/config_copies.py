"""Gives a model its own copies of its configs, as models built from one config would switch each other's attention."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from fastprefix.hf.attention.function import NAME

_IMPLEMENTATION = "_attn_implementation"


@dataclass
class _Config:
    original: Any
    own: Any
    implementation: str  # the attention implementation before fastprefix's
    fields: dict[str, Any]  # the copy's fields when it was made


class ConfigCopies:
    """Copies of a model's configs, on which the attention implementation is switched until :meth:`restore`."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.on = False  # whether attention runs through fastprefix
        memo: dict[int, Any] = {}
        found: dict[int, Any] = {}
        for module in model.modules():
            config = module.__dict__.get("config")
            if config is not None and hasattr(config, _IMPLEMENTATION):
                found[id(config)] = config
                module.config = copy.deepcopy(config, memo)
        self.configs = [
            _Config(config, memo[key], config._attn_implementation, copy.deepcopy(memo[key].__dict__))
            for key, config in found.items()
        ]

    def switch(self, on: bool) -> None:
        """Switch the model's attention to fastprefix's, or back to the former one; no-op if it is so already."""
        if on == self.on:
            return
        self.on = on
        for config in self.configs if on else ():
            if config.own._attn_implementation != NAME:
                config.implementation = config.own._attn_implementation
        for config in self.configs:
            config.own._attn_implementation = NAME if on else config.implementation

    @contextmanager
    def switched_on(self) -> Iterator[None]:
        """Let the model's attention run through fastprefix inside the block."""
        on = self.on
        self.switch(on=True)
        try:
            yield
        finally:
            self.switch(on=on)

    def before(self, module: Any) -> str | None:
        """Name of the implementation that a module's attention used before; None for eager, which has no name."""
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        names = (c.implementation for c in self.configs if c.own is getattr(module, "config", None))
        name = next(names, self.configs[0].implementation)
        return name if name in ALL_ATTENTION_FUNCTIONS else None

    @property
    def ran_eager(self) -> bool:
        """Whether the model's attention was eager before, which gets a mask where other implementations get None."""
        return bool(self.configs) and self.configs[-1].implementation == "eager"

    def changed(self) -> str | None:
        """The implementation that user code has set instead of fastprefix's; None if there is none."""
        names = (config.own._attn_implementation for config in self.configs)
        return next((name for name in names if name != NAME), None)

    def restore(self) -> None:
        """Give every module its original config, with all fields that were changed meanwhile but the implementation."""
        back = {id(config.own): config for config in self.configs}
        for module in self.model.modules():
            config = back.get(id(module.__dict__.get("config")))
            if config is not None:
                module.config = config.original
        for config in self.configs:
            for name, value in config.own.__dict__.items():
                if name.startswith(_IMPLEMENTATION) or id(value) in back:  # a nested config has its own original
                    continue
                if name not in config.fields or config.fields[name] != value:
                    config.original.__dict__[name] = value
