"""The provider of a PEFT model's adapters: the layers read PEFT's own parameters, which are not copied."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fastprefix.errors import fail
from fastprefix.hf.adapters.installation import Installation
from fastprefix.hf.peft.fitting import Fit
from fastprefix.hf.runtime.forward_context import AdapterSelection, KeyValues, Name, ResolvedPrefix
from fastprefix.hf.storage.decoder_slots import WITH_CROSS
from fastprefix.hf.storage.peft_format import PREFIX_TYPES, PROMPT_TYPES

MULTITASK = "MULTITASK_PROMPT_TUNING"
PATCHED_PROMPT_TYPES = (*PROMPT_TYPES, MULTITASK)  # the last one's files need PEFT to be loaded
DIRECT = (*PREFIX_TYPES, "PROMPT_TUNING")  # without a projection their encoder's output is a parameter
BASE = "__base__"  # PEFT's name for a row without adapter in a mixed batch


def kind(config: Any) -> str:
    """A PEFT configuration's type by name."""
    return str(getattr(config.peft_type, "value", config.peft_type))


def reads_cross(config: Any) -> bool:
    """Whether cross-attention reads its slots of an encoder-decoder's prefix."""
    return bool(config.num_transformer_submodules == WITH_CROSS)


def task(model: Any) -> str:
    """A PEFT model's task by name."""
    task_type = model.active_peft_config.task_type
    return str(getattr(task_type, "value", task_type))


class Adapters:
    """The ``PrefixProvider`` of a patched model. A name is a PEFT adapter's; for multitask prompts ``(name, task)``."""

    gated = False

    def __init__(self, installation: Installation, peft_model: Any) -> None:
        self.installation = installation
        self.peft_model = peft_model
        self.bypassed = False  # while PEFT's own forward concatenates the prompt
        self.shifted = False  # while the caller's position ids are shifted already
        self.fit = Fit(installation.facts)
        self.completed: set[str] = set()  # names of an encoder-decoder's prefixes that read_cross_too changed

    @property
    def two_stacks(self) -> bool:
        """Whether the model is an encoder-decoder."""
        return len(self.installation.facts.layers.stacks) > 1

    def read_cross_too(self, name: str) -> None:
        """Let a new prefix of an encoder-decoder be read by cross-attention too, where PEFT leaves slots untrained.

        A prefix that PEFT has trained stays what it is: its slots of cross-attention have the numbers of their start.
        """
        config = self.peft_model.peft_config[name]
        new = kind(config) in PREFIX_TYPES and not config.inference_mode
        if self.two_stacks and new and config.num_transformer_submodules == 2:
            config.num_transformer_submodules = WITH_CROSS
            self.completed.add(name)
            warnings.warn(
                f"fastprefix: adapter {name!r} is taken for a new one: the slots of cross-attention, which PEFT never "
                "reads, are read and trained. Load one that PEFT has trained into the patched model (load_adapter)",
                stacklevel=5,
            )

    def restore(self) -> None:
        """Undo :meth:`read_cross_too`."""
        for name in self.completed & set(self.names()):
            self.peft_model.peft_config[name].num_transformer_submodules = 2

    def names(self) -> list[str]:
        """Names of PEFT's adapters."""
        return list(self.peft_model.peft_config)

    def resident(self) -> list[str]:
        """Names of all adapters, as PEFT keeps them in memory."""
        return self.names()

    @contextmanager
    def held(self, selection: AdapterSelection) -> Iterator[None]:
        """Let heads in PEFT's ``modules_to_save`` use each row's adapter inside the block, as PEFT's LoRA does."""
        from peft.utils.other import AuxiliaryTrainingWrapper

        names = [name[0] if isinstance(name, tuple) else name or BASE for name in selection.names]
        mixed = len(set(names)) > 1 or names[0] != self.peft_model.active_adapter
        heads = [m for m in self.installation.model.modules() if mixed and isinstance(m, AuxiliaryTrainingWrapper)]

        def name_rows(head: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            return args, {**kwargs, "adapter_names": AdapterSelection(tuple(names)).rows(len(args[0]))}

        handles = [head.register_forward_pre_hook(name_rows, with_kwargs=True) for head in heads]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def enabled(self) -> bool:
        """False while PEFT's adapters are disabled, or PEFT's own forward concatenates the prompt."""
        return not (self.bypassed or self.peft_model._adapters_disabled)

    def active(self) -> AdapterSelection | None:
        """PEFT's active adapter for all rows; None while :meth:`enabled` is False."""
        model = self.peft_model
        if self.bypassed or model._adapters_disabled or model.active_adapter not in self.names():
            return None
        return AdapterSelection((model.active_adapter,))

    def choose(self, adapter_names: Sequence[str | None] | None, task_ids: Any) -> AdapterSelection | None:
        """The selection that a call's ``adapter_names`` and ``task_ids`` make; None for the active adapter."""
        if adapter_names is not None:
            names = [None if name in (None, BASE) else name for name in adapter_names]
            if not names:
                raise fail("adapter_names", "no names", "one for each row of the batch")
            for name in names:
                if name is not None and name not in self.names():
                    raise fail("adapter_names", repr(name), f"{BASE!r}, None or one of {sorted(self.names())}")
        elif self.peft_model.active_adapter in self.names():
            names = [self.peft_model.active_adapter]
        else:
            return None
        tasks = [None] if task_ids is None else torch.as_tensor(task_ids).reshape(-1).tolist()
        if len(names) == 1 or len(tasks) == 1:
            names, tasks = names * len(tasks), tasks * len(names)
        if len(names) != len(tasks):
            raise fail("task_ids", f"{len(tasks)} tasks", f"one for each of {len(names)} adapter_names")
        rows = tuple(self._row(name, task) for name, task in zip(names, tasks, strict=True))
        return None if adapter_names is None and rows == (self.peft_model.active_adapter,) else AdapterSelection(rows)

    def _row(self, name: str | None, task: int | None) -> Name | None:
        if name is None or kind(self.peft_model.peft_config[name]) != MULTITASK:
            return name
        if task is None:
            raise ValueError("task_ids cannot be None")  # PEFT's message
        return name, task

    def resolve(self, name: Name) -> ResolvedPrefix:
        """The prefix or soft prompt of an adapter; raises ValueError for an unknown name."""
        name, task = name if isinstance(name, tuple) else (name, None)
        if name not in self.names():
            raise fail("names", repr(name), f"None or one of {sorted(self.names())}")
        config = self.peft_model.peft_config[name]
        encoder = self.peft_model.prompt_encoder[name]
        tokens, parameters, what = config.num_virtual_tokens, encoder.parameters, kind(config)
        if what in PREFIX_TYPES:

            def key_values() -> KeyValues:
                return self.fit(config, self.encoded(str(name)))

            layers = self.installation.facts.layers.parts
            read = [p for p in layers if p in (None, "decoder") or (p == "cross" and reads_cross(config))]
            offset = 0 if self.shifted else tokens
            return ResolvedPrefix(what, tokens, offset, parameters, key_values, layers=len(read))

        def prompt() -> Tensor:
            if what != MULTITASK:
                # Of an encoder-decoder's 2P embeddings PEFT reads P, in front of the encoder's rows.
                found = self.encoded(str(name))
                return found if len(found) == tokens else found[:tokens]
            if task is None:
                raise ValueError("task_ids cannot be None")
            device = encoder.embedding.weight.device
            ids = self.peft_model.prompt_tokens[name][None].to(device)
            return encoder(ids, torch.tensor([task], device=device))[0]

        return ResolvedPrefix(what, tokens, tokens, parameters, prompt=prompt)

    def encoded(self, name: str) -> Tensor:
        """The output of an adapter's encoder, without a batch: ``[P, 2*L*H_kv*D]`` or ``[P, d]``."""
        config, encoder = self.peft_model.peft_config[name], self.peft_model.prompt_encoder[name]
        if config.inference_mode or (kind(config) in DIRECT and not getattr(config, "prefix_projection", False)):
            return encoder.embedding.weight  # a lookup of all rows would copy them
        ids = self.peft_model.prompt_tokens[name][: config.num_virtual_tokens]
        return encoder(ids[None].to(encoder.embedding.weight.device))[0]
