"""Splits PEFT's single tensor of keys and values into those of a model's layers."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from fastprefix.errors import fail
from fastprefix.hf.model.facts import ModelFacts
from fastprefix.hf.runtime.forward_context import KeyValues
from fastprefix.hf.storage.decoder_slots import WITH_CROSS, decoder_slots
from fastprefix.prefixes.prefix import LayerKV


class Fit:
    """Selects the slots of PEFT's tensor that each layer reads, and the part of each slot.

    Layers of one model may differ in shape (Gemma 4). A smaller layer reads a part of its slots, as in PEFT, and a
    layer larger than the slots gets no prefix. A layer without keys of its own shares another layer's prefix too.
    The decoder of an encoder-decoder reads the slots that PEFT's ``past_key_values`` hold for it (``decoder_slots``).
    """

    def __init__(self, facts: ModelFacts) -> None:
        self.model, self.layers = facts.model, facts.layers
        self.warned = False

    def check(self, config: Any) -> None:
        """Raise ValueError unless an adapter with this configuration fits the layers."""
        layers, shapes = len(self.layers.modules), self.layers.shapes
        heads, dim = config.num_attention_heads, config.token_dim // config.num_attention_heads
        if self.two_stacks:
            self._check_decoder(config, heads, dim)
        elif config.num_layers != layers:
            raise fail("num_layers", config.num_layers, f"{layers}, the model's attention layers")
        uneven = [shape for shape in shapes if shape.head_dim != shape.value_dim]
        if uneven:
            got = f"a prefix with one head dim, {dim}"
            raise fail(
                "token_dim", got, f"keys of {uneven[0].head_dim} and values of {uneven[0].value_dim}: attach one"
            )
        if not any(s.num_kv_heads <= heads and s.head_dim <= dim for s in shapes):
            want = ", ".join(f"{n} of {d}" for n, d in sorted({(s.num_kv_heads, s.head_dim) for s in shapes}))
            raise fail("token_dim", f"{heads} key/value heads of {dim}", f"at least those of some layer: {want}")

    @property
    def two_stacks(self) -> bool:
        """Whether the model is an encoder-decoder."""
        return len(self.layers.stacks) > 1

    def _check_decoder(self, config: Any, heads: int, dim: int) -> None:
        """Raise ValueError unless a prefix of an encoder-decoder has the shape of all decoder layers."""
        if config.num_transformer_submodules not in (2, WITH_CROSS):
            expected = f"2, or {WITH_CROSS} of a patched model: the model is an encoder-decoder"
            raise fail("num_transformer_submodules", config.num_transformer_submodules, expected)
        pairs = zip(self.layers.parts, self.layers.shapes, strict=True)
        want = sorted({(s.num_kv_heads, s.head_dim) for part, s in pairs if part != "encoder"})
        if want != [(heads, dim)]:
            shown = ", ".join(f"{n} of {d}" for n, d in want)
            raise fail("token_dim", f"{heads} key/value heads of {dim}", f"those of the decoder: {shown}")

    def shape(self, layer: int) -> tuple[int, int]:
        """A layer's key/value heads and head dim; where layers differ, as PEFT reads them from the model's config."""
        from peft import peft_model

        real, rule = self.layers.shapes[layer], getattr(peft_model, "_get_layer_kv_target_shape", None)
        # As in PEFT, the rule is applied to such models alone: other configs need not have the fields.
        differ = len(set(self.layers.shapes)) > 1
        found = rule(self.model.config.get_text_config(), layer) if differ and rule is not None else None
        return (real.num_kv_heads, real.head_dim) if found is None else found

    def __call__(self, config: Any, embeddings: Tensor) -> KeyValues:
        """Each layer's keys and values of ``[P, 2*L*H_kv*D]``: views, so that nothing more is saved for backward."""
        heads, dim = config.num_attention_heads, config.token_dim // config.num_attention_heads
        slots = embeddings.unflatten(1, (2 * config.num_layers, heads, dim)).permute(1, 2, 0, 3)
        if not torch.is_grad_enabled():  # kept as long as a cache, so worth a copy
            slots = slots.contiguous()
        if self.two_stacks:
            cross = config.num_transformer_submodules == WITH_CROSS
            firsts = decoder_slots(self.layers.parts, len(slots), cross)
            return [None if i is None else LayerKV(slots[i], slots[i + 1]) for i in firsts]
        found: KeyValues = []
        sources = self.layers.kv_sources
        for source in sources:
            n, d = self.shape(source)
            fits = n <= heads and d <= dim
            # [H_kv, P, D]
            found.append(LayerKV(slots[2 * source][:n, :, :d], slots[2 * source + 1][:n, :, :d]) if fits else None)
        if all(kv is None for kv in found):
            raise ValueError(
                f"Prefix tuning skipped every layer: its {heads} key/value heads of {dim} are smaller than any layer's"
            )
        skipped = [i for i, kv in enumerate(found) if kv is None or sources[i] != i]
        if skipped and not self.warned:
            self.warned = True
            warnings.warn(
                f"Prefix tuning skipped {skipped} due to KV shape mismatch or shared-KV layers: their slots are not "
                "trained (a layer that shares keys reads the prefix of the layer it shares them with)",
                stacklevel=2,
            )
        return found
