"""``AttentionSlots``: the child modules in which a model's attention modules hold their prefixes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from fastprefix.hf.attention.function import SLOT
from fastprefix.hf.attention.packed_prompts import PackedPrompts
from fastprefix.hf.model.facts import ModelFacts
from fastprefix.hf.model.layers import AttentionStack
from fastprefix.hf.runtime.forward_context import KeyValues
from fastprefix.prefixes.prefix import LayerSlot


class AttentionSlots:
    """A :class:`LayerSlot` in every attention module of a model, in the layers' order."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.modules = tuple(modules)
        for module in self.modules:
            module.add_module(SLOT, LayerSlot())

    def __len__(self) -> int:
        return len(self.modules)

    def __getitem__(self, layer: int) -> LayerSlot:
        # Looked up each time, as copying or wrapping the model may have replaced the slot's object.
        slot = self.modules[layer]._modules[SLOT]
        assert isinstance(slot, LayerSlot)
        return slot

    def __iter__(self) -> Iterator[LayerSlot]:
        return map(self.__getitem__, range(len(self.modules)))

    def present(self) -> bool:
        """Whether all slots are still in the model."""
        return all(SLOT in module._modules for module in self.modules)

    def activate(self, name: str | None) -> None:
        """Let every layer read the prefix of this name, or none."""
        for slot in self:
            slot.active = name

    def set_overrides(self, layers: KeyValues, stack: AttentionStack) -> None:
        """Let the layers of one stack read these keys and values instead of the active prefix."""
        slots = list(self)
        for i in stack.layers:
            slots[i].set_override(layers[i])

    def clear_overrides(self) -> None:
        """Let every layer read the active prefix again."""
        for slot in self:
            if slot.is_overridden:
                slot.clear_override()

    def set_packed(self, packed: PackedPrompts | None) -> None:
        """Let every layer take a text of prompts and rows apart; None: no layer."""
        for slot in self:
            slot.packed = packed

    def check_ran(self, facts: ModelFacts, stack: AttentionStack, training: bool, without_encoder: bool) -> bool:
        """Raise RuntimeError if a layer of a stack did not call the attention function in its first forward.

        Returns:
            Whether all layers were seen; those of cross-attention do not run ``without_encoder``.
        """
        parts, config = facts.layers.parts, facts.model.config
        skipped = {"cross"} if without_encoder else set()
        missed = [i for i in stack.layers if not self[i].ran and parts[i] not in skipped]
        drops = [getattr(config, f"{part}layerdrop", 0.0) for part in ("", "encoder_", "decoder_")]
        skips_layers = training and any(drop > 0.0 for drop in drops)
        if missed and not skips_layers:
            name = type(facts.model).__name__
            raise RuntimeError(
                f"fastprefix: {name} ran without the attention hook of layers {missed}: the prefix was ignored there"
            )
        return not skipped or "cross" not in parts

    def remove(self) -> None:
        """Take the slots out of the model."""
        for module in self.modules:
            del module._modules[SLOT]
