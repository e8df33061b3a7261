"""PEFT's LLaMA-Adapter (Zhang et al. 2023), whose gated prompt the layer's own attention reads here.

PEFT projects the queries again, repeats the prompt for every row and multiplies its output by ``o_proj`` a second
time. Here the prompt's keys and values are computed once per forward, and ``gate * o_prompt`` is added to the layer's
``o_content`` before ``o_proj``.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from peft.tuners.adaption_prompt.config import TRANSFORMERS_MODEL_CONFIG
from peft.tuners.adaption_prompt.layer import AdaptedAttention, AdaptedAttentionGPT
from torch import Tensor

from fastprefix.errors import fail
from fastprefix.functional import add_gated
from fastprefix.hf.adapters.installation import Installation
from fastprefix.hf.attention.function import SLOT
from fastprefix.hf.runtime.forward_context import AdapterSelection, KeyValues, Name, ResolvedPrefix
from fastprefix.prefixes.prefix import LayerKV


class FusedAttention(AdaptedAttention):
    """PEFT's adapted attention, which leaves the gated prompt to the wrapped attention layer."""

    def forward(self, **kwargs: Any) -> Any:
        """The output of the wrapped attention layer."""
        return self.model(**kwargs)

    def key_values(self) -> tuple[Tensor, Tensor]:
        """Keys and values ``[H_kv, P, D]`` of the prompt, without rotary positions."""
        names = TRANSFORMERS_MODEL_CONFIG[self.model_type]
        made = (getattr(self.model, name)(self.adaption_prompt) for name in (names.k_proj_layer, names.v_proj_layer))
        k, v = (x[0].unflatten(-1, (-1, self.model.head_dim)).transpose(0, 1) for x in made)
        return k, v


class FusedAttentionGPT(AdaptedAttentionGPT):
    """PEFT's adapted attention of GPT-2, in which the gated prompt's output is added after the output projection."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The output of the wrapped attention layer, plus the gated prompt's for the same queries."""
        slot = self.model._modules[SLOT]
        slot.keeps_query, slot.query = True, None
        try:
            output, *rest = self.model(*args, **kwargs)
            q = slot.query
        finally:
            slot.keeps_query, slot.query = False, None
        k, v = self.key_values()
        heads = output.unflatten(-1, (-1, self.model.head_dim)).transpose(1, 2)  # [B, H, S, D]
        o = add_gated(heads, q, k, v, self.adaption_gate.expand(self.num_heads))
        return o.transpose(1, 2).flatten(2), *rest

    def key_values(self) -> tuple[Tensor, Tensor]:
        """Keys and values ``[H, P, D]`` of the prompt."""
        made = self.model.c_attn(self.adaption_prompt)[0].chunk(3, dim=-1)[1:]
        k, v = (x.unflatten(-1, (-1, self.model.head_dim)).transpose(0, 1) for x in made)
        return k, v


FUSED = {AdaptedAttention: FusedAttention, AdaptedAttentionGPT: FusedAttentionGPT}


class Gated:
    """The ``PrefixProvider`` of a model with adaption prompts.

    PEFT swaps adapted modules into the model and out of it; the provider reads those that are in the model. The
    content keeps the attention that the model had: with gates at zero the output is the same, bit for bit.
    """

    gated = True

    def __init__(self, installation: Installation, peft_model: Any) -> None:
        self.installation = installation
        self.peft_model = peft_model

    def names(self) -> list[str]:
        """The name of the active adapter alone, as one batch has one gate; empty without one."""
        active = self.peft_model.base_model._active_adapter
        return [] if active is None else [active]

    def resident(self) -> list[str]:
        """The same as :meth:`names`."""
        return self.names()

    def held(self, selection: AdapterSelection) -> AbstractContextManager[None]:
        """A block that does nothing, as no adapter is kept on disk."""
        return nullcontext()

    def enabled(self) -> bool:
        """Whether PEFT's adapted modules are in the model."""
        return bool(self.peft_model.base_model._enabled)

    def active(self) -> AdapterSelection | None:
        """The adapter whose modules are in the model, for all rows; None without one."""
        return AdapterSelection(tuple(self.names())) if self.names() and self.peft_model.base_model._enabled else None

    def modules(self) -> list[Any]:
        """The active adapter's adapted modules, from the lowest layer up."""
        tuner = self.peft_model.base_model
        name = tuner._active_adapter
        target = tuner.peft_config[name].target_modules
        return [getattr(parent, target) for parent in tuner._parents[name]]

    def resolve(self, name: Name) -> ResolvedPrefix:
        """The active adapter, as gated keys and values of the adapted layers; ValueError for another name."""
        if name not in self.names():
            raise fail("names", repr(name), f"the active adapter, {self.names()}")
        modules = self.modules()

        def parameters() -> list[Tensor]:
            return [x for m in modules for x in (m.adaption_prompt, m.adaption_gate)]

        def key_values() -> KeyValues:
            index = {id(module): i for i, module in enumerate(self.installation.facts.layers.modules)}
            found: KeyValues = [None] * len(index)
            for module in modules:
                if isinstance(module, FusedAttention):
                    k, v = module.key_values()
                    gate = module.adaption_gate.expand(module.num_heads)
                    found[index[id(module.model)]] = LayerKV(k, v, gate=gate)
            return found

        tokens = modules[0].adapter_len
        return ResolvedPrefix("ADAPTION_PROMPT", tokens, 0, parameters, key_values, layers=len(modules))


def fuse(peft_model: Any) -> None:
    """Give all adapted modules fastprefix's classes, including those that PEFT has swapped out."""
    for module in adapted(peft_model):
        module.__class__ = FUSED.get(type(module), type(module))


def unfuse(peft_model: Any) -> None:
    """Give all adapted modules PEFT's classes again."""
    back = {ours: theirs for theirs, ours in FUSED.items()}
    for module in adapted(peft_model):
        module.__class__ = back.get(type(module), type(module))


def adapted(peft_model: Any) -> list[Any]:
    """The adapted attention modules of all adapters, in the model or swapped out."""
    tuner = peft_model.base_model
    inside = [m for m in tuner.modules() if isinstance(m, tuple(FUSED))]
    return inside + [m for modules in tuner._cached_adapters.values() for m in modules]
