"""What layers have besides keys and values, in adapter weights, such as ``layers.<i>.gate``.

A gate is ``[H]``, or ``[1]`` for all heads of the layer; a bias ``[H_kv, P]``; a prompt of LLaMA-Adapter ``[P, d]``,
whose keys and values are not saved; a memory ``[H, D, D_v]``, which has none. PEFT's ADAPTION_PROMPT calls prompts and
gates ``base_model.model.<attention module>.adaption_prompt``, ``[1, P, d]``, and ``adaption_gate``, ``[1]``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastprefix.errors import fail
from fastprefix.hf.adapters.added.llama_adapter import find_projections
from fastprefix.hf.adapters.installation import Installation
from fastprefix.prefixes.kv import PrefixLayer
from fastprefix.prefixes.llama_adapter import LlamaAdapterConfig
from fastprefix.prefixes.memory import PrefixMemoryConfig
from fastprefix.prefixes.prefix import Prefix
from fastprefix.validation import is_int

ADAPTION = "ADAPTION_PROMPT"
_PEFT = {"prompt": "adaption_prompt", "gate": "adaption_gate"}
_PEFT_MODELS = ("llama", "mistral")  # in which PEFT computes what LlamaAdapterConfig says; in GPT-2 it does not
Wanted = dict[str, tuple[str, Sequence[int]]]  # dims in words, and sizes, by a tensor's name


def _parameters(prefix: Prefix) -> Iterator[tuple[str, Tensor]]:
    for i, layer in zip(prefix.layer_indices, prefix.layers, strict=True):
        assert isinstance(layer, PrefixLayer)
        for name, x in layer.extras().items():
            yield f"layers.{i}.{name}", x


def tensors(prefix: Prefix) -> dict[str, Tensor]:
    """What is saved: the trained numbers, those of gates before tanh."""
    return {name: x.detach().cpu().contiguous() for name, x in _parameters(prefix)}


def shapes(prefix: Prefix) -> Wanted:
    """The tensors that a prefix is filled from, besides keys and values."""
    return {name: ("shape", list(x.shape)) for name, x in _parameters(prefix)}


@torch.no_grad()
def fill(prefix: Prefix, saved: Mapping[str, Tensor]) -> None:
    """Copy saved numbers into a prefix's parameters."""
    for name, x in _parameters(prefix):
        x.copy_(saved[name])


def wanted_beside(prefix: Prefix) -> Wanted:
    """The gates and biases that a prefix of this configuration is loaded from."""
    layers = list(zip(prefix.layer_indices, prefix.shapes, strict=True)) if prefix.has_bias else []
    tokens = prefix.num_virtual_tokens
    biases: Wanted = {f"layers.{i}.bias": ("[H_kv, P]", [shape.num_kv_heads, tokens]) for i, shape in layers}
    return {**wanted_gates(prefix), **biases}


def wanted_gates(prefix: Prefix) -> Wanted:
    """The gates that a prefix of this configuration is loaded from."""
    kind = prefix.config.gate
    if kind is None:
        return {}
    dims = "[1]" if kind == "scalar" else "[H]"
    layers = zip(prefix.layer_indices, prefix.num_heads, strict=True)
    return {f"layers.{i}.gate": (dims, [1 if kind == "scalar" else heads]) for i, heads in layers}


def wanted(installation: Installation, prefix: Prefix) -> Wanted:
    """All tensors that a LLaMA-Adapter or a memory of this configuration is loaded from."""
    if isinstance(prefix.config, PrefixMemoryConfig):
        sizes = zip(prefix.layer_indices, prefix.num_heads, prefix.shapes, strict=True)
        return {
            f"layers.{i}.memory": ("[H, D, D_v]", [heads, shape.head_dim, shape.value_dim]) for i, heads, shape in sizes
        }
    found = find_projections(installation, prefix.layer_indices)
    tokens, layers = prefix.num_virtual_tokens, zip(prefix.layer_indices, found, strict=True)
    prompts: Wanted = {f"layers.{i}.prompt": ("[P, d]", [tokens, project.width]) for i, project in layers}
    return {**prompts, **wanted_gates(prefix)}


def is_adaption(installation: Installation, prefix: Prefix) -> bool:
    """Whether PEFT's ADAPTION_PROMPT can represent a LLaMA-Adapter, and PEFT computes the same with it."""
    return (
        isinstance(prefix.config, LlamaAdapterConfig)
        and prefix.config.gate == "scalar"
        and prefix.config.modules_to_save is None
        and why_not_adaption(installation) is None
    )


def why_not_adaption(installation: Installation) -> str | None:
    """The reason why PEFT's ADAPTION_PROMPT computes something else in a model; None where it is the same."""
    model, modules = installation.model, installation.facts.layers.modules
    if model.config.model_type not in _PEFT_MODELS:
        return f"PEFT does not add its prompts to {type(model).__name__}'s attention before the output projection"
    if any(getattr(module.o_proj, "bias", None) is not None for module in modules):
        return "PEFT adds the bias of the output projection to a prompt's output a second time"
    return None


def to_adaption(installation: Installation, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A LLaMA-Adapter's tensors as PEFT saves them."""
    modules = {id(module): name for name, module in installation.model.named_modules()}
    found = {}
    for name, x in ours.items():
        _, layer, kind = name.split(".")
        at = modules[id(installation.facts.layers.modules[int(layer)])]
        found[f"base_model.model.{at}.{_PEFT[kind]}"] = x[None].contiguous() if kind == "prompt" else x
    return found


def from_adaption(theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that PEFT saved, by our names; others keep their names."""
    found = {}
    for name, x in theirs.items():
        parts = re.fullmatch(r"base_model\.model\.(?:.*\.)?(\d+)\.\w+\.(adaption_prompt|adaption_gate)", name)
        kind = None if parts is None else next(ours for ours, other in _PEFT.items() if other == parts[2])
        ours = name if parts is None else f"layers.{parts[1]}.{kind}"
        found[ours] = x[0] if kind == "prompt" and x.dim() == 3 and len(x) == 1 else x
    return found


def adaption_config(config: LlamaAdapterConfig, layers: int) -> dict[str, Any]:
    """The fields of PEFT's AdaptionPromptConfig for an adapter of so many layers."""
    return {"peft_type": ADAPTION, "adapter_len": config.num_virtual_tokens, "adapter_layers": layers}


def peft_adapter_configuration(peft: Mapping[str, Any]) -> LlamaAdapterConfig:
    """The configuration of what PEFT's AdaptionPromptConfig describes."""
    for name in ("adapter_len", "adapter_layers"):
        if not is_int(peft.get(name)):
            raise fail(name, repr(peft.get(name)), "an int of at least 1")
    return LlamaAdapterConfig(peft["adapter_len"], peft["adapter_layers"], gate="scalar")


def own_configuration(own: Mapping[str, Any]) -> LlamaAdapterConfig | PrefixMemoryConfig:
    """The configuration that ``save`` wrote, of ``own["kind"]``."""
    if own["kind"] == "prefix_memory":
        return PrefixMemoryConfig(own.get("layers"), own.get("parts"))
    names = ("num_virtual_tokens", "num_layers", "gate")
    return LlamaAdapterConfig(**{name: own[name] for name in names if name in own})
