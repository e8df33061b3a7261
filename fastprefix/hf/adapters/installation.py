"""``Installation``: all slots, hooks and records that fastprefix puts into one model, and their removal."""

from __future__ import annotations

from typing import Any

from fastprefix.errors import fail
from fastprefix.hf.adapters.attached_prefixes import AttachedPrefixes
from fastprefix.hf.adapters.continuous_batching import ContinuousBatching
from fastprefix.hf.adapters.freezing import Frozen
from fastprefix.hf.adapters.modules_to_save import ENCODERS, TrainedModules
from fastprefix.hf.attention import method_overrides
from fastprefix.hf.attention.config_copies import ConfigCopies
from fastprefix.hf.attention.masks import requested
from fastprefix.hf.attention.query_scaling import QueryScaling
from fastprefix.hf.attention.recording import recording
from fastprefix.hf.model import causality, default_positions, dtensor, encoder_decoder, offload, outer_modules
from fastprefix.hf.model.facts import ModelFacts, position_table
from fastprefix.hf.model.layers import find_layers, of_all_processes
from fastprefix.hf.model.probing import does_not_dispatch
from fastprefix.hf.model.rope_limits import rope_limits
from fastprefix.hf.runtime.cache_origin import CacheOrigins
from fastprefix.hf.runtime.checkpointing import Checkpointing
from fastprefix.hf.runtime.forward_context import ForwardState
from fastprefix.hf.runtime.forward_hooks import ForwardHooks
from fastprefix.hf.runtime.forward_lock import ForwardLock
from fastprefix.hf.runtime.lm_head_hooks import LMHeadHooks
from fastprefix.hf.runtime.pooled_head import PooledHead
from fastprefix.hf.runtime.prefix_reader import PrefixReader
from fastprefix.hf.runtime.prompt_prefill import PromptPrefill
from fastprefix.hf.runtime.selection import Selection
from fastprefix.hf.runtime.slots import AttentionSlots
from fastprefix.hf.runtime.warn_once import WarnOnce


class Installation:
    """Assembles the parts that work inside one model.

    The records ``facts``, ``selection`` and ``forward`` are shared between parts. Each hook receives only the parts
    that it needs; this class alone knows all of them.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.selection = Selection()
        self.forward = ForwardState()
        self.warn = WarnOnce()
        self.frozen = Frozen()
        self.parameters = offload.AttachedParameters()
        self.configs = ConfigCopies(model)
        self.overrides = method_overrides.install_overrides(model)
        requested.clear()  # an interrupted forward of another model may not have cleared it
        self.facts = self._discover()
        layers = self.facts.layers
        self.slots = AttentionSlots(layers.modules)
        self.query_scaling = QueryScaling(layers.modules)
        self.pooled = PooledHead(model, layers.main)  # runs the model, so before any hooks are set
        self.modules = TrainedModules(model, layers, self.selection)
        self.selection.provider = AttachedPrefixes(self.selection, len(layers.modules), self.modules)
        self.lock = ForwardLock(model, layers.stacks)
        self.head = LMHeadHooks(self.facts, self.selection, self.forward, self.lock)
        self.outer = outer_modules.OuterCall(model, layers.main, self.facts.outer, self.configs)
        self.continuous = ContinuousBatching(model, self.selection, self.configs)
        self.origins = CacheOrigins(self.facts, self.selection, self.warn)
        prefill = PromptPrefill(self.facts, self.slots, self.forward)
        self.reader = PrefixReader(self.facts, self.selection, self.forward, prefill, self.warn)
        self.checkpointing = Checkpointing(
            self.facts,
            self.configs,
            self.slots,
            self.selection,
            self.forward,
            self.lock,
            self.query_scaling,
            self.modules,
        )
        self.hooks = [
            ForwardHooks(
                stack,
                table,
                facts=self.facts,
                configs=self.configs,
                slots=self.slots,
                reader=self.reader,
                forward=self.forward,
                lock=self.lock,
                origins=self.origins,
                parameters=self.parameters,
                checkpointing=self.checkpointing,
                head=self.head,
                pooled=self.pooled,
                outer=self.outer,
                query_scaling=self.query_scaling,
            )
            for stack, table in zip(layers.stacks, self.facts.position_tables, strict=True)
        ]
        self.lock.hook()

    def _discover(self) -> ModelFacts:
        """Run the model on a few tokens and return its :class:`ModelFacts`; an error leaves the model as it was."""
        model = self.model
        try:
            self.configs.switch(on=True)
            is_two_stacks = encoder_decoder.is_encoder_decoder(model)
            mesh = dtensor.tensor_parallel_mesh(model)
            if is_two_stacks and mesh is not None:
                expected = "a model of one stack of layers, or a whole encoder-decoder"
                raise fail("model", f"a tensor-parallel {type(model).__name__}", expected)
            layers = encoder_decoder.find_layers(model) if is_two_stacks else find_layers(model)
            if mesh is not None:
                layers = of_all_processes(model, layers, mesh)
            offload.refuse_offloaded_layers(model, layers.modules)
            self._check_masks(layers)
            outer = outer_modules.find_outer_modules(model, layers.main)
            positions = default_positions.find(model, layers.main)
            if not positions.moved:
                layers = layers.without_positions()
            tables = tuple(position_table(model, stack, stack is layers.main) for stack in layers.stacks)
        except BaseException as error:
            self._restore_methods()
            dtensor.refuse_uneven_heads(model)
            if isinstance(error, ValueError) and error.__cause__ is not None and causality.runs(model):
                raise does_not_dispatch(model, f", or reads masks of another form ({error.__cause__})") from error
            if isinstance(error, Exception) and not isinstance(error, ValueError):
                got = f"{type(model).__name__}, whose layers cannot be looked at: it fails on a few tokens ({error})"
                raise fail("model", got, "a model that runs on input_ids alone, or the part of it that does") from error
            raise
        self.configs.switch(on=False)
        return ModelFacts(model, layers, tuple(rope_limits(layers.main.owner)), positions, outer, tables)

    def _check_masks(self, layers: Any) -> None:
        """Raise ValueError for a model whose causality changes under fastprefix.

        Such a model combines our mask with one of its own. Our mask leaves causality to the layer, so it would be lost.
        """
        with recording() as calls:
            ours = causality.sees_the_future(layers.main)
        causality.check_keys(self.model, layers.main, calls)
        self.configs.switch(on=False)
        before = causality.sees_the_future(layers.main)
        self.configs.switch(on=True)
        if ours != before:
            raise does_not_dispatch(self.model, ": it makes masks of its own")

    def freeze(self) -> None:
        """Freeze the model except the attached prefixes, and remember which parameters were trainable."""
        prefixes = self.selection.prefixes.values()
        self.frozen.freeze(self.model, {id(p) for prefix in prefixes for p in prefix.parameters()})

    def activate(self, name: str | None) -> None:
        """Make one prefix active, or none: then the model runs exactly its own attention."""
        selection = self.selection
        provider = selection.provider
        if name is not None and name not in provider.names():
            raise fail("name", repr(name), f"None or one of {sorted(provider.names())}")
        self.modules.use(provider.modules(name) if isinstance(provider, AttachedPrefixes) else {})
        selection.active = name
        self.slots.activate(name)
        self.configs.switch(on=name is not None)

    def _restore_methods(self) -> None:
        """Restore the model's own configs and methods."""
        self.configs.restore()
        method_overrides.remove_overrides(self.overrides)

    def remove(self) -> None:
        """Take all parts out of the model and restore its trainable parameters."""
        for hooks in self.hooks:
            hooks.remove()
        for part in (self.lock, self.head, self.outer, self.query_scaling, self.pooled, self.continuous):
            part.remove()
        self.checkpointing.remove()
        self.slots.remove()
        for stack in self.facts.layers.stacks:
            stack.owner._modules.pop(ENCODERS, None)
        self.modules.remove()
        self._restore_methods()
        self.frozen.thaw()
