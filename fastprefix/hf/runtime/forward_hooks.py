"""What runs around each forward of an attached model: prefixes, positions, packing, a check that all layers ran."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastprefix.hf.attention import masks
from fastprefix.hf.attention import position_ids as positions
from fastprefix.hf.model import position_embeddings as tables
from fastprefix.hf.model.layers import Stack
from fastprefix.hf.runtime import cache_origin, concatenation
from fastprefix.hf.runtime.prefix_reader import Reading, batch_size
from fastprefix.validation import fail

if TYPE_CHECKING:
    from fastprefix.hf.adapters.installation import Installation


class ForwardHooks:
    """Hooks on the module that makes a stack's positions and masks."""

    def __init__(self, state: Installation, stack: Stack, table: nn.Module | None) -> None:
        self.state = state
        self.stack = stack
        self.checked = False
        self.origin: cache_origin.Origin | None = None  # of a cache that the forward that runs makes
        self.alone = False  # whether a decoder runs without an encoder's states, which its cross-attention then skips
        owner = stack.owner
        self.table = positions.learned_table(owner)
        self.shift = None if table is None else tables.Table(table)
        self.handles = [
            owner.register_forward_pre_hook(self.before, with_kwargs=True),
            owner.register_forward_hook(self.after, always_call=True),
        ]

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self.handles:
            handle.remove()
        if self.shift is not None:
            self.shift.handle.remove()

    def before(self, owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Find what the layers read, shift positions behind it and refuse what cannot be right."""
        state = self.state
        if state.paused:
            return None
        kwargs = {**dict(zip(self.stack.owner_arguments, args, strict=False)), **kwargs}
        if state.nested is None and not torch.compiler.is_compiling():
            self.reset()  # an interrupt may have kept the last forward from it
            if "past_key_values" in self.stack.owner_arguments:
                cache_origin.check(state, kwargs)
                self.origin = cache_origin.of(state, kwargs)
        if state.idle():
            return None
        if not torch.compiler.is_compiling():
            state.home.bring_back(state.model)
            state.home.check_trained()
        reading = state.nested.reading if state.nested is not None else state.read(kwargs)
        if reading is None and state.nested is None:
            state.switch(on=False)
            return None
        state.switch(on=True)
        self.alone = kwargs.get("encoder_hidden_states") is None
        self.refuse(kwargs)
        if reading is not None and reading.beside:
            masks.running.beside = state.slots[0].beside
            return self.start(reading, kwargs)
        masks.running.spelt_out, masks.running.always = not self.stack.causal, state.configs.ran_eager
        if "attention_mask" in kwargs and not state.outer.makes_masks:
            kwargs["attention_mask"] = _whole_mask(kwargs)
        self.separate_documents(owner, kwargs)
        reading = Reading(layers=[None] * len(state.slots)) if reading is None else reading
        self.place(reading, kwargs)
        return self.start(reading, kwargs)

    def start(self, reading: Reading, kwargs: dict[str, Any]) -> Any:
        """Hand the reading to the layers."""
        state = self.state
        reading = state.checkpointing.leave(reading)
        state.running = reading
        state.query_scales.offset = reading.offset
        if reading.layers is not None:
            state.give(reading, self.stack)
        if reading.concatenated is not None:
            concatenation.prepend(state, reading, kwargs)
        if state.checkpointing.active():
            state.checkpointing.remember_reading()
        elif reading.layers is None:
            state.share_encoder(self.stack)
        return (), kwargs

    def reset(self) -> None:
        """Nothing of an earlier forward is left."""
        state = self.state
        state.running, self.origin = None, None
        state.query_scales.offset = 0
        state.take_back()
        state.unshare_encoder()
        masks.running.forget()
        if self.shift is not None:
            self.shift.offset = 0

    def place(self, reading: Reading, kwargs: dict[str, Any]) -> None:
        """Give the content the positions behind it."""
        state, causal = self.state, self.stack.causal
        if state.layers.main is not self.stack:
            return  # an encoder in front of a decoder keeps its positions, as in Li & Liang 2021
        if self.shift is not None:
            self.shift.offset = reading.offset
            return
        mask, ids = kwargs.get("attention_mask"), kwargs.get("position_ids")
        if state.nested is None or state.nested.outermost:
            mask, ids = state.outer.own_arguments(kwargs)
        counts = causal or state.outer.outer.makes_positions
        shifted = isinstance(reading.offset, Tensor) or reading.offset > 0
        if self.stack.takes_positions and (shifted or (counts and ids is None)):
            given, first = {**kwargs, "attention_mask": mask, "position_ids": ids}, state.first_position
            ids = positions.content_positions(given, reading.offset, counts, self.table, first)
            if state.counting.first:  # whoever counts so reads a position for every row
                ids = ids.expand(batch_size(state, kwargs), -1).contiguous()
            kwargs["position_ids"] = ids
        if state.heads.wanted and isinstance(mask, Tensor) and mask.dim() == 2:
            reading.padding = (mask.cumsum(1) == 0).sum(1)
            prompted = state.prompted_rows(len(mask))
            if prompted is not None:  # a row without a prompt keeps what it has
                reading.padding = reading.padding * prompted.to(mask.device)

    def refuse(self, kwargs: dict[str, Any]) -> None:
        """Raise where the prefix would be ignored or cannot be right."""
        if kwargs.get("output_attentions") or getattr(self.state.model.config, "output_attentions", False):
            raise fail("output_attentions", True, "False: fused attention never materialises its weights")
        if other := self.state.configs.changed():
            got = f"{other!r}, set while a prefix is attached"
            raise fail("attn_implementation", got, "fastprefix: detach first, or the prefix would be ignored")

    def separate_documents(self, owner: nn.Module, kwargs: dict[str, Any]) -> None:
        """Packed rows: transformers looks for documents only where there is no cache, and not in every model."""
        if not self.stack.causal:
            return
        takes_cache = "use_cache" in self.stack.owner_arguments
        if torch.compiler.is_compiling():
            # The ids cannot be read. In training those that come without a mask may be packed, and need no cache.
            may_be = kwargs.get("position_ids") is not None and kwargs.get("attention_mask") is None
            if may_be and self.state.layers.kinds and kwargs.get("past_key_values") is None:
                got = "ids that may be those of packed documents, which torch.compile cannot read"
                expected = f"an attention_mask beside them: layers of {type(self.state.model).__name__} carry a state"
                raise fail("position_ids", got, f"{expected} past a document's end")
            if owner.training and takes_cache and may_be and not kwargs.get("use_cache"):
                kwargs["use_cache"] = False
            return
        boundary = positions.documents(kwargs)
        if boundary is not None and self.state.layers.kinds:
            got, model = "packed documents (they jump)", type(self.state.model).__name__
            raise fail("position_ids", got, f"one document a row: layers of {model} carry a state past its end")
        masks.running.boundary = boundary
        if boundary is not None and takes_cache:
            kwargs["use_cache"] = False

    def after(self, owner: nn.Module, args: Any, output: Any) -> Any:
        """Forget what belongs to this forward; after the first one, check that no layer passed the prefix by."""
        state, reading, heads = self.state, self.state.running, self.state.heads
        if state.paused or not state.turns.mine():
            return None
        if self.shift is not None:
            self.shift.offset = 0
        state.query_scales.offset = 0
        if not torch.compiler.is_compiling():
            masks.running.forget()
            if self.origin is not None and output is not None and state.nested is None:
                cache_origin.keep(output, self.origin)
        if reading is None:
            return None
        state.running = None
        if reading.layers is not None:
            state.take_back()
        else:
            state.unshare_encoder()
        if output is None:
            return None
        if state.nested is not None:
            state.nested.hidden = output[0]
            return None
        if not torch.compiler.is_compiling() and not self.checked:
            self.check(owner)
        if reading.concatenated is not None and state.pooled:
            state.pooled.tokens, state.pooled.length = reading.concatenated.shape[1], output[0].shape[1]
            return None
        if reading.concatenated is not None:
            output = concatenation.cut(output, reading.concatenated.shape[1], int(heads.wanted))
            return heads.behind_padding(output, reading) if heads.wanted else output
        if reading.leaves:
            raise RuntimeError("fastprefix: no checkpointed layer ran, which would have passed on the gradients")
        if heads.wanted and reading.last is not None:
            return heads.behind_padding(heads.widen(output, reading.last), reading)
        return None

    def check(self, owner: nn.Module) -> None:
        """Raise if a layer's attention went past our function."""
        state = self.state
        alone = {"cross"} if self.alone else set()
        missed = [i for i in self.stack.layers if not state.slots[i].ran and state.layers.parts[i] not in alone]
        drops = [getattr(state.model.config, f"{part}layerdrop", 0.0) for part in ("", "encoder_", "decoder_")]
        skips_layers = owner.training and any(drop > 0.0 for drop in drops)
        if missed and not skips_layers:
            name = type(state.model).__name__
            raise RuntimeError(
                f"fastprefix: {name} ran without the attention hook of layers {missed}: the prefix was ignored there"
            )
        self.checked = not alone or "cross" not in state.layers.parts


def _whole_mask(kwargs: dict[str, Any]) -> Any:
    """A 4-D mask of the caller's own says everything: spell its rows out, so that it is not taken for padding."""
    mask = kwargs.get("attention_mask")
    source = kwargs.get("input_ids") if kwargs.get("input_ids") is not None else kwargs.get("inputs_embeds")
    if isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[2] == 1 and source is not None:
        return mask.expand(-1, -1, source.shape[1], -1)
    return mask
