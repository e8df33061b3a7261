"""Everything fastprefix put into one model, and what it needs to take it out again."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fastprefix.hf.adapters.attached_prefixes import Attached
from fastprefix.hf.adapters.freezing import Frozen
from fastprefix.hf.adapters.modules_to_save import ENCODERS, TrainedModules
from fastprefix.hf.attention import method_overrides as bypassing
from fastprefix.hf.attention.config_copies import OwnConfigs
from fastprefix.hf.attention.function import SLOT, masks, recording
from fastprefix.hf.attention.query_scaling import QueryScales
from fastprefix.hf.model import causality, default_positions, encoder_decoder
from fastprefix.hf.model import layers as probe
from fastprefix.hf.model import offload as offloaded
from fastprefix.hf.model import outer_modules as outer
from fastprefix.hf.model import position_embeddings as tables
from fastprefix.hf.runtime import exactness
from fastprefix.hf.runtime import prefix_reader as reading
from fastprefix.hf.runtime.checkpointing import Checkpointing
from fastprefix.hf.runtime.continuous_batching import ContinuousBatching
from fastprefix.hf.runtime.forward_hooks import ForwardHooks
from fastprefix.hf.runtime.forward_lock import Turns
from fastprefix.hf.runtime.lm_head_hooks import HeadHooks
from fastprefix.hf.runtime.pooled_head import PooledHead
from fastprefix.hf.runtime.prefix_reader import Choice, Reading, Source
from fastprefix.hf.runtime.prompt_kv_cache import Memo
from fastprefix.hf.runtime.prompt_prefill import Nested
from fastprefix.prefixes.prefix import LayerSlot, Prefix
from fastprefix.prefixes.prompt import SoftPrompt
from fastprefix.validation import fail

if TYPE_CHECKING:
    from fastprefix.hf.adapters.shared_prompt import SharedPrompt

_numbers = itertools.count()


class Installation:
    """What is in one model: a slot in every attention layer, hooks around them, and which prefix they read."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.number = next(_numbers)  # in the origin of its caches
        self.prefixes: dict[str, Prefix | SoftPrompt] = {}
        self.active: str | None = None
        self.source: Source = Attached(self)
        self.chosen: Choice | None = None  # by a block of prefix_batch
        self.shared: SharedPrompt | None = None  # by a block of shared_prompt
        self.running: Reading | None = None  # what the forward that runs reads
        self.nested: Nested | None = None
        self.prepared: reading.Bank | None = None  # what was computed for the next forward already
        self.paused = False  # whether the model runs as if nothing were attached
        self.memo = Memo()
        self.said: set[str] = set()
        self.reads_token_ids = False  # whether layers do, beside embeddings; known where soft prompts are
        self.loss_fits_mask = True  # whether labels may be longer than the mask beside them; known where patched
        self.frozen = Frozen()
        self.home = offloaded.Home()
        self.configs = OwnConfigs(model)
        self.led = bypassing.lead(model)
        masks.running.forget()  # an interrupt may have kept another model's forward from it
        try:
            self.switch(on=True)
            self.layers = (
                encoder_decoder.find_layers(model) if encoder_decoder.is_one(model) else probe.find_layers(model)
            )
            offloaded.refuse_whole(model, self.layers.modules)
            self.check_masks()
            around = outer.look(model, self.layers.main)
            self.counting = default_positions.find(model, self.layers.main)
            if not self.counting.moved:
                self.layers = probe.without_positions(self.layers)
            moved = [tables.table(model, stack, stack is self.layers.main) for stack in self.layers.stacks]
        except BaseException as error:
            self.give_back()
            if isinstance(error, ValueError) and error.__cause__ is not None and causality.runs(model):
                raise probe.does_not_dispatch(model, f", or reads masks of another form ({error.__cause__})") from error
            if isinstance(error, Exception) and not isinstance(error, ValueError):
                got = f"{type(model).__name__}, whose layers cannot be looked at: it fails on a few tokens ({error})"
                raise fail("model", got, "a model that runs on input_ids alone, or the part of it that does") from error
            raise
        self.switch(on=False)
        self.rotary_limits = tuple(exactness.rotary_limits(self.layers.main.owner))
        for module in self.layers.modules:
            module.add_module(SLOT, LayerSlot())
        self.query_scales = QueryScales(self.layers.modules)
        self.checkpointing = Checkpointing(self)
        self.pooled = PooledHead(model, self.layers.main)  # it runs the model: before there are hooks
        self.heads = HeadHooks(self)
        self.outer = outer.OuterCall(model, self.layers.main, around, self.configs)
        self.continuous = ContinuousBatching(self)
        self.hooks = [ForwardHooks(self, *pair) for pair in zip(self.layers.stacks, moved, strict=True)]
        self.turns = Turns(self)
        self.modules = TrainedModules(self)

    def __getstate__(self) -> dict[str, Any]:
        # A copy made inside a block is outside of it.
        nothing = dict.fromkeys(("chosen", "shared", "running", "nested", "prepared"))
        return {**self.__dict__, **nothing}

    def check_masks(self) -> None:
        """Some models merge masks with their own: what ours leave to the layer's causality would be lost on them."""
        with recording() as calls:
            ours = causality.sees_the_future(self.layers.main)
        causality.check_keys(self.model, self.layers.main, calls)
        self.switch(on=False)
        before = causality.sees_the_future(self.layers.main)
        self.switch(on=True)
        if ours != before:
            raise probe.does_not_dispatch(self.model, ": it makes masks of its own")

    @property
    def slots(self) -> list[LayerSlot]:
        """One per attention layer, in order."""
        slots = [getattr(module, SLOT) for module in self.layers.modules]
        assert all(isinstance(slot, LayerSlot) for slot in slots)
        return slots

    @property
    def first_position(self) -> int:
        """Of a row's first token in the forward that runs."""
        return self.outer.first_position if self.outer.given else self.counting.first

    def switch(self, on: bool) -> None:
        """Let the model's attention run through fastprefix, or as it did before."""
        if on != self.configs.on:
            self.configs.switch(on)

    def freeze(self) -> None:
        """Freeze the model, but for what was attached to it; what it was is remembered."""
        self.frozen.freeze(self.model, {id(p) for prefix in self.prefixes.values() for p in prefix.parameters()})

    def named(self, name: str) -> Prefix | SoftPrompt:
        """The prefix of a name; raises ValueError when none is attached under it."""
        if name not in self.prefixes:
            raise fail("name", repr(name), f"one of {sorted(self.prefixes)}")
        return self.prefixes[name]

    def activate(self, name: str | None) -> None:
        """Use one prefix, or none: then the model runs exactly what it ran before."""
        if name is not None and name not in self.source.names():
            raise fail("name", repr(name), f"None or one of {sorted(self.source.names())}")
        self.modules.use(self.source.modules(name) if isinstance(self.source, Attached) else {})
        self.active = name
        for slot in self.slots:
            slot.active = name
        self.switch(on=name is not None)

    def choice(self) -> Choice | None:
        """What the next forward's rows read."""
        if self.chosen is None:
            return self.source.active()
        return self.chosen if self.source.enabled() else None

    def idle(self) -> bool:
        """Whether a forward is the bare model's, and nothing has to be switched off for it."""
        busy = self.configs.on or self.nested is not None or self.shared is not None
        return not busy and self.choice() is None

    def has_prompts(self) -> bool:
        """Whether a row of the next forward has a soft or shared prompt in front of it."""
        choice = self.choice()
        if self.shared is not None or choice is None:
            return self.shared is not None
        return any(self.source.entry(name).prompt is not None for name in choice.distinct())

    def prompted_rows(self, batch: int) -> Tensor | None:
        """``[B]`` bool, the rows that have one; None for all."""
        import torch

        choice = self.choice()
        if self.shared is not None or choice is None:
            return None
        spoken = {name: self.source.entry(name).prompt is not None for name in choice.distinct()}
        found = [name is not None and spoken[name] for name in choice.rows(batch)]
        return None if all(found) else torch.tensor(found)

    def read(self, kwargs: dict[str, Any]) -> Reading | None:
        """What a forward reads; None for the bare model."""
        choice = self.choice()
        if self.shared is not None:
            return self.shared.read(self, choice, kwargs)
        return None if choice is None else self.read_choice(choice, kwargs)

    def read_choice(self, choice: Choice, kwargs: dict[str, Any]) -> Reading | None:
        """What a choice of names means in a forward."""
        if len(choice.names) == 1 and choice.names[0] == self.active and self.active in self.prefixes:
            prefix = self.prefixes[self.active]
            if isinstance(prefix, Prefix):
                return Reading(prefix.offset)
        return reading.read(self, choice, kwargs)

    @contextmanager
    def preparing(self, bank: reading.Bank) -> Iterator[None]:
        """Let the forward inside the block read what was computed already."""
        self.prepared = bank
        try:
            yield
        finally:
            self.prepared = None

    def give(self, reading: Reading, stack: probe.Stack) -> None:
        """Let a stack's layers read it."""
        assert reading.layers is not None
        slots = self.slots
        for i in stack.layers:
            slots[i].give(reading.layers[i])

    def take_back(self) -> None:
        """Let the layers read the active prefix again."""
        for slot in self.slots:
            slot.take_back()

    def share_encoder(self, stack: probe.Stack) -> None:
        """Compute the active prefix's MLP for all of a stack's layers at once."""
        prefix = self.prefixes.get(self.active) if self.active is not None else None
        if isinstance(prefix, Prefix) and prefix.encoder is not None:
            prefix.encoder.share([self.layers.parts[i] for i in stack.layers])

    def unshare_encoder(self) -> None:
        """Forget what it gave."""
        prefix = self.prefixes.get(self.active) if self.active is not None else None
        if isinstance(prefix, Prefix) and prefix.encoder is not None:
            prefix.encoder.unshare()

    def give_back(self) -> None:
        """Let the model run on its own configs and methods again."""
        self.configs.restore()
        bypassing.restore(self.led)

    def remove(self) -> None:
        """Undo everything."""
        for hooks in self.hooks:
            hooks.remove()
        self.turns.remove()
        self.heads.remove()
        self.outer.remove()
        self.query_scales.remove()
        self.pooled.remove()
        self.continuous.remove()
        self.checkpointing.remove()
        for module in self.layers.modules:
            del module._modules[SLOT]
        self.layers.main.owner._modules.pop(ENCODERS, None)
        self.modules.remove()
        self.give_back()
        self.frozen.thaw()
