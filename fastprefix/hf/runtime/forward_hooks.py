"""Hooks around each forward of an attached model: prefixes, positions, packing, a check that all layers ran."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastprefix.errors import fail
from fastprefix.hf.attention import masks, position_ids
from fastprefix.hf.attention.config_copies import ConfigCopies
from fastprefix.hf.attention.packed_documents import separate_documents
from fastprefix.hf.attention.position_embeddings import ShiftedTable
from fastprefix.hf.attention.query_scaling import QueryScaling
from fastprefix.hf.model.facts import ModelFacts
from fastprefix.hf.model.layers import AttentionStack
from fastprefix.hf.model.offload import AttachedParameters
from fastprefix.hf.model.outer_modules import OuterCall
from fastprefix.hf.runtime import cache_origin, concatenation
from fastprefix.hf.runtime.checkpointing import Checkpointing
from fastprefix.hf.runtime.forward_context import ForwardContext, ForwardState
from fastprefix.hf.runtime.forward_lock import ForwardLock
from fastprefix.hf.runtime.insertion import rows
from fastprefix.hf.runtime.lm_head_hooks import LMHeadHooks
from fastprefix.hf.runtime.pooled_head import PooledHead
from fastprefix.hf.runtime.prefix_reader import PrefixReader
from fastprefix.hf.runtime.slots import AttentionSlots


class ForwardHooks:
    """Hooks on the module that makes a stack's position ids and masks.

    They ask the PrefixReader for a ForwardContext, hand it to the layers' slots, and drop it when the forward ends.
    """

    def __init__(
        self,
        stack: AttentionStack,
        table: nn.Module | None,
        *,
        facts: ModelFacts,
        configs: ConfigCopies,
        slots: AttentionSlots,
        reader: PrefixReader,
        forward: ForwardState,
        lock: ForwardLock,
        origins: cache_origin.CacheOrigins,
        parameters: AttachedParameters,
        checkpointing: Checkpointing,
        head: LMHeadHooks,
        pooled: PooledHead,
        outer: OuterCall,
        query_scaling: QueryScaling,
    ) -> None:
        self.stack, self.facts, self.configs, self.slots = stack, facts, configs, slots
        self.reader, self.selection, self.forward, self.lock = reader, reader.selection, forward, lock
        self.origins, self.parameters, self.checkpointing = origins, parameters, checkpointing
        self.head, self.pooled, self.outer, self.query_scaling = head, pooled, outer, query_scaling
        self.checked = False  # whether every layer was seen to read its prefix
        self.origin: cache_origin.Origin | None = None  # of a cache that the running forward makes
        self.without_encoder = False  # whether a decoder runs without an encoder's states, and skips cross-attention
        owner = stack.owner
        self.table = position_ids.learned_table(owner)
        self.shifted_table = None if table is None else ShiftedTable(table)
        self.handles = [
            owner.register_forward_pre_hook(self.before, with_kwargs=True),
            owner.register_forward_hook(self.after, always_call=True),
        ]

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self.handles:
            handle.remove()
        if self.shifted_table is not None:
            self.shifted_table.handle.remove()

    def is_idle(self) -> bool:
        """Whether the next forward reads no prefix and fastprefix's attention is switched off already."""
        selection = self.selection
        busy = self.configs.on or self.forward.nested is not None or selection.shared is not None
        return not busy and selection.current() is None

    @property
    def is_encoder(self) -> bool:
        """Whether the stack is an encoder-decoder's encoder."""
        return self.stack is not self.facts.layers.main

    @property
    def first_position(self) -> int:
        """Position of a row's first token in the running forward."""
        return self.outer.first_position if self.outer.given else self.facts.default_positions.first

    def before(self, owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before a forward: make its context, shift the content's positions, refuse arguments that cannot work."""
        forward = self.forward
        if forward.bypassed:
            return None
        kwargs = {**dict(zip(self.stack.owner_arguments, args, strict=False)), **kwargs}
        if forward.nested is None and not torch.compiler.is_compiling():
            self.reset()  # an interrupt may have stopped the last forward before its own reset
            if "past_key_values" in self.stack.owner_arguments:
                self.origin = self.origins.check(kwargs)
        if self.is_idle():
            return None
        if not torch.compiler.is_compiling():
            self.parameters.bring_back(self.facts.model)
            self.parameters.check_trained()
        encoded, nested = self.stack is not self.facts.layers.prompted, forward.nested
        context = self.reader.read(kwargs, encoded) if nested is None else nested.context
        if context is None and nested is None:
            self.configs.switch(on=False)
            return None
        self.configs.switch(on=True)
        self.without_encoder = kwargs.get("encoder_hidden_states") is None
        self.refuse(kwargs)
        if context is not None and context.gated:
            masks.requested.implementation = self.slots[0].fallback_attention
            return self.start(context, kwargs)
        masks.requested.explicit_causal = not self.stack.causal
        masks.requested.even_without_padding = self.configs.ran_eager
        if "attention_mask" in kwargs and not self.outer.makes_masks:
            kwargs["attention_mask"] = masks.over_all_rows(kwargs)
        if self.stack.causal:
            model, hybrid = type(self.facts.model).__name__, bool(self.facts.layers.hybrid_layer_types)
            separate_documents(kwargs, self.stack.owner_arguments, model, hybrid, owner.training)
        context = ForwardContext(layers=[None] * len(self.slots)) if context is None else context
        if context.inserted is not None and rows.go_on(context.inserted, kwargs, self.first_position):
            context.inserted = None  # the prompt is in the cache
        self.set_positions(context, kwargs)
        return self.start(context, kwargs)

    def start(self, context: ForwardContext, kwargs: dict[str, Any]) -> Any:
        """Hand a context to the layers' slots and return the forward's arguments."""
        context = self.checkpointing.detach_prompt(context)
        self.forward.context = context
        self.query_scaling.offset = context.offset
        if context.layers is not None:
            self.slots.set_overrides(context.layers, self.stack)
        if context.concatenated is not None:
            padding_idx = None if self.table is None else self.table.padding_idx
            # RoBERTa's positions start after its padding index, PaliGemma's at 1.
            first = self.first_position + (0 if padding_idx is None else padding_idx + 1)
            concatenation.prepend(self.facts, context, kwargs, first, self.outer.makes_masks, bool(self.pooled))
            self.forward.encoded = self.is_encoder
        elif context.encoded and isinstance(states := kwargs.get("encoder_hidden_states"), Tensor):
            known = torch.compiler.is_compiling() or self.forward.knows(states)
            concatenation.extend_mask(kwargs, states, context.encoded, known)
        if context.inserted is not None:
            rows.insert(self.facts, context.inserted, kwargs, self.table, self.outer.makes_masks)
        if self.checkpointing.active():
            self.checkpointing.wrap_functions()
        elif context.layers is None and (encoder := self.selection.active_encoder()) is not None:
            # The MLP computes all layers of the stack at once.
            encoder.share([self.facts.layers.parts[i] for i in self.stack.layers])
        return (), kwargs

    def reset(self) -> None:
        """Clear everything that an earlier forward may have left."""
        self.forward.context, self.origin = None, None
        self.query_scaling.offset = 0
        self.slots.clear_overrides()
        self.unshare_encoder()
        masks.requested.clear()
        if self.shifted_table is not None:
            self.shifted_table.offset = 0

    def unshare_encoder(self) -> None:
        """Drop the keys and values that the active prefix's MLP computed for this forward."""
        if (encoder := self.selection.active_encoder()) is not None:
            encoder.unshare()

    def set_positions(self, context: ForwardContext, kwargs: dict[str, Any]) -> None:
        """Shift the content's positions past the prefix."""
        facts, causal = self.facts, self.stack.causal
        if self.is_encoder:
            return  # the encoder of an encoder-decoder keeps its positions, as in Li & Liang 2021
        if self.shifted_table is not None:
            self.shifted_table.offset = context.offset
            return
        mask, ids = kwargs.get("attention_mask"), kwargs.get("position_ids")
        if self.forward.nested is None or self.forward.nested.outermost:
            mask, ids = self.outer.own_arguments(kwargs)
        counts = causal or facts.outer.makes_positions
        shifted = isinstance(context.offset, Tensor) or context.offset > 0
        if self.stack.takes_positions and (shifted or (counts and ids is None)):
            given, first = {**kwargs, "attention_mask": mask, "position_ids": ids}, self.first_position
            ids = position_ids.content_positions(given, context.offset, counts, self.table, first)
            if facts.default_positions.first:  # such a model needs position ids for every row
                ids = ids.expand(facts.layers.batch_size(kwargs), -1).contiguous()
            kwargs["position_ids"] = ids
        if self.head.active and isinstance(mask, Tensor) and mask.dim() == 2:
            context.padding = self.selection.padding_behind_prompts(mask)

    def refuse(self, kwargs: dict[str, Any]) -> None:
        """Raise for arguments or settings with which the prefix would be ignored, or its output wrong."""
        if kwargs.get("output_attentions") or getattr(self.facts.model.config, "output_attentions", False):
            raise fail("output_attentions", True, "False: fused attention never materialises its weights")
        if other := self.configs.changed():
            got = f"{other!r}, set while a prefix is attached"
            raise fail("attn_implementation", got, "fastprefix: detach first, or the prefix would be ignored")

    def after(self, owner: nn.Module, args: Any, output: Any) -> Any:
        """After a forward: drop its context; after the first forward, check that every layer read the prefix."""
        forward, head = self.forward, self.head
        context = forward.context
        if forward.bypassed or not self.lock.held_by_me():
            return None
        if self.shifted_table is not None:
            self.shifted_table.offset = 0
        self.query_scaling.offset = 0
        if not torch.compiler.is_compiling():
            masks.requested.clear()
            if self.origin is not None and output is not None and forward.nested is None:
                cache_origin.keep(output, self.origin)
        if context is None:
            return None
        forward.context = None
        if context.layers is not None:
            self.slots.clear_overrides()
        else:
            self.unshare_encoder()
        if output is None:
            return None
        if forward.nested is not None:
            forward.nested.hidden = output[0]
            return None
        if not torch.compiler.is_compiling() and not self.checked:
            self.checked = self.slots.check_ran(self.facts, self.stack, owner.training, self.without_encoder)
        if context.inserted is not None:
            return rows.cut(output, context.inserted)
        if context.concatenated is not None:
            if self.is_encoder:
                return None  # the decoder reads the prompt's states too, as in Lester et al. 2021
            if self.pooled:
                return self.pooled.cut_next(context.concatenated.shape[1], output[0].shape[1])
            output = concatenation.cut(output, context.concatenated.shape[1], int(head.active), context.places)
            return head.move_past_left_padding(output, context) if head.active else output
        if context.leaves:
            raise RuntimeError("fastprefix: no checkpointed layer ran, which would have passed on the gradients")
        if head.active and context.last is not None:
            return head.move_past_left_padding(head.prepend_hidden(output, context.last), context)
        return None

    def check_again(self) -> None:
        """Check in the next forward, once more, that every layer reads its prefix."""
        self.checked = False
        for i in self.stack.layers:
            self.slots[i].ran = False

    @contextmanager
    def unchecked(self) -> Iterator[None]:
        """Leave what the checks know as it is, whatever runs inside the block."""
        before, self.checked = self.checked, True
        try:
            yield
        finally:
            self.checked = before
