"""The content of adapter files: PEFT's tensors and configuration fields, and fastprefix's own."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastprefix.errors import fail
from fastprefix.hf.model.layers import Layers
from fastprefix.hf.storage import layer_tensors
from fastprefix.hf.storage.decoder_slots import WITH_CROSS, decoder_slots
from fastprefix.hf.storage.validated_files import check_tensors, field, shown
from fastprefix.prefixes import init
from fastprefix.prefixes.config import PrefixConfig
from fastprefix.prefixes.llama_adapter import LlamaAdapterConfig
from fastprefix.prefixes.memory import PrefixMemoryConfig
from fastprefix.prefixes.prefix import LayerConfig, Prefix
from fastprefix.prefixes.prompt import PromptConfig, SoftPrompt

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
OWN_CONFIG, ENCODER = "fastprefix_config.json", "prefix_encoder.safetensors"
FORMAT_VERSION = 1
EMBEDDINGS = "prompt_embeddings"
OWN = "FASTPREFIX"  # the peft_type of adapters that PEFT cannot represent
PREFIX_TYPES, PROMPT_TYPES = ("PREFIX_TUNING", "CARTRIDGE"), ("PROMPT_TUNING", "P_TUNING")
PEFT_TYPES = (*PREFIX_TYPES, *PROMPT_TYPES, layer_tensors.ADAPTION)
KINDS = {
    "prompt": PromptConfig,
    "llama_adapter": LlamaAdapterConfig,
    "prefix_memory": PrefixMemoryConfig,
}  # of a configuration's field "kind"

_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


def pack(keys: Sequence[Tensor], values: Sequence[Tensor]) -> Tensor:
    """PEFT's ``prompt_embeddings``: ``[P, 2*L*H_kv*D]`` from L keys and values ``[H_kv, P, D]``."""
    slots = [x for pair in zip(keys, values, strict=True) for x in pair]
    return torch.stack(slots).permute(2, 0, 1, 3).flatten(1).contiguous()


def unpack(embeddings: Tensor, prefix: Prefix) -> tuple[list[Tensor], list[Tensor]]:
    """The inverse of :func:`pack`, as PEFT reads it.

    A layer without keys and values of its own reads the slots of the layer with which it shares them. Those of an
    encoder-decoder are :func:`decoder_slots`.
    """
    heads, dim, _ = prefix.shapes[0]
    slots = embeddings.unflatten(1, (-1, heads, dim)).permute(1, 2, 0, 3)  # [2L, H_kv, P, D]
    if prefix.parts[0] is None:
        first: list[int] = [2 * source for source in prefix.sources]
    else:
        first = [slot for slot in decoder_slots(prefix.parts, len(slots), cross=True) if slot is not None]
    return [slots[i].contiguous() for i in first], [slots[i + 1].contiguous() for i in first]


def is_peft(prefix: Prefix, layers: Layers) -> bool:
    """Whether PEFT's format can represent a prefix of a model with these layers, and PEFT computes the same with it."""
    shapes = set(prefix.shapes)
    if (
        prefix.is_added
        or prefix.has_bias
        or any(part is not None for part in prefix.parts)
        or layers.reuses_modules
        or layers.hybrid_layer_types
    ):
        return False
    uniform = len(shapes) == 1 and prefix.shapes[0].head_dim == prefix.shapes[0].value_dim
    moves = layers.main.takes_positions and prefix.config.position_offset == "after_prefix"
    return uniform and moves and prefix.sources == tuple(range(len(layers.modules)))


def task(model: Any) -> str:
    """PEFT's task type of a model, by its class's name."""
    name = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False) and model.get_output_embeddings() is not None:
        return "SEQ_2_SEQ_LM"
    return next((t for suffix, t in _TASKS.items() if name.endswith(suffix)), "FEATURE_EXTRACTION")


def peft_config(model: Any, prefix: Prefix | SoftPrompt, modules: Sequence[str]) -> dict[str, Any]:
    """The configuration fields that PEFT reads; ``modules``: names of the modules that are saved with the prefix."""
    base = {
        "task_type": task(model),
        "base_model_name_or_path": getattr(model.config, "_name_or_path", "") or None,
        "inference_mode": True,
    }
    if isinstance(prefix, Prefix) and isinstance(prefix.config, LlamaAdapterConfig):
        return {**base, **layer_tensors.adaption_config(prefix.config, len(prefix.layer_indices))}
    common = {
        **base,
        "num_virtual_tokens": prefix.num_virtual_tokens,
        "num_transformer_submodules": 1,
        "modules_to_save": list(modules) or None,
    }
    if isinstance(prefix, SoftPrompt):
        dim, given = prefix.embedding.shape[1], prefix.config
        if given.place != "before":
            return {"peft_type": OWN, "num_virtual_tokens": prefix.num_virtual_tokens}  # PEFT has no field for it
        if prefix.encoder is None:
            return {**common, "peft_type": "PROMPT_TUNING", "token_dim": dim}
        return {
            **common,
            "peft_type": "P_TUNING",
            "token_dim": dim,
            "encoder_reparameterization_type": prefix.encoder.kind.upper(),
            "encoder_hidden_size": given.encoder_hidden_size or dim,
            "encoder_num_layers": given.encoder_num_layers,
            "encoder_dropout": given.encoder_dropout,
        }
    heads, dim, _ = prefix.shapes[0]
    config = {
        **common,
        "peft_type": "PREFIX_TUNING",
        "token_dim": heads * dim,
        "num_attention_heads": heads,
        "num_layers": len(prefix.shapes),
    }
    if prefix.config.num_frozen_tokens:
        return {**config, "peft_type": "CARTRIDGE", "num_frozen_tokens": prefix.config.num_frozen_tokens}
    return {**config, "prefix_projection": False, "encoder_hidden_size": None}


def peft_configuration(peft: dict[str, Any], path: Path) -> LayerConfig | PromptConfig:
    """fastprefix's configuration for a PEFT adapter; ValueError naming path and field where it cannot be loaded."""
    kind = field(peft, "peft_type", str, path)
    if kind not in PEFT_TYPES:
        raise fail(f"{path}: peft_type", shown(kind), f"{', '.join(PEFT_TYPES)} or FASTPREFIX")
    if kind == layer_tensors.ADAPTION:
        with errors_naming(path):
            return layer_tensors.peft_adapter_configuration(peft)
    submodules = field(peft, "num_transformer_submodules", int, path, None)
    tokens = field(peft, "num_virtual_tokens", int, path)
    with errors_naming(path):
        if kind == "PREFIX_TUNING" and submodules == 2:  # an encoder-decoder's
            return PrefixConfig(tokens, parts=("decoder",))
        if kind == "PREFIX_TUNING" and submodules == WITH_CROSS:
            return PrefixConfig(tokens, parts=("decoder", "cross"))
        if submodules not in (1, None) and not (submodules == 2 and kind in PROMPT_TYPES):
            raise fail("num_transformer_submodules", submodules, "1, or an encoder-decoder's 2")
        if kind in PROMPT_TYPES:
            return PromptConfig(tokens)
        return PrefixConfig(tokens, num_frozen_tokens=peft.get("num_frozen_tokens", 0) if kind == "CARTRIDGE" else 0)


def own_configuration(own: dict[str, Any], path: Path) -> LayerConfig | PromptConfig:
    """The configuration that :func:`save` wrote; ValueError naming path and field when it is malformed."""
    if field(own, "format_version", int, path) != FORMAT_VERSION:
        raise fail(f"{path}: format_version", own["format_version"], str(FORMAT_VERSION))
    kinds = (PrefixConfig, *KINDS.values()) if "kind" in own else (PrefixConfig,)
    configured = {f.name for kind in kinds for f in dataclasses.fields(kind)}
    known = {"format_version", "kind", "projected", "weights", "encoder_weights", "frozen_modules"}
    unknown = sorted(set(own) - configured - known)
    if unknown:
        raise fail(f"{path}: {shown(unknown[0])}", "a field of no known meaning", f"those of version {FORMAT_VERSION}")
    for name in ("weights", "encoder_weights", "init"):
        field(own, name, str, path, None)
    tokens = field(own, "num_virtual_tokens", int, path)
    if "kind" in own:
        if own["kind"] not in KINDS:
            expected = f"{' or '.join(map(repr, KINDS))}, or no such field for keys and values"
            raise fail(f"{path}: kind", shown(own["kind"]), expected)
        if own["kind"] != "prompt":
            with errors_naming(path):
                return layer_tensors.own_configuration(own)
        encoder: dict[str, Any] = {}
        if field(own, "projected", bool, path, None):
            names = [f.name for f in dataclasses.fields(PromptConfig) if f.name.startswith("encoder")]
            encoder = {name: own[name] for name in names if name in own}
            field(own, "encoder", str, path)
        with errors_naming(path):
            return PromptConfig(tokens, place=own.get("place", "before"), **encoder)
    kept = ("num_virtual_tokens", "layers", "position_offset", "num_frozen_tokens", "parts")
    fields: dict[str, Any] = {n: own[n] for n in (*kept, "gate", "dropout", "prefix_bias") if n in own}
    if field(own, "projected", bool, path, None):
        fields.update(prefix_projection=True, encoder_hidden_size=own.get("encoder_hidden_size"))
    with errors_naming(path):
        return PrefixConfig(**fields, init=init.normal())


@contextmanager
def errors_naming(path: Path) -> Iterator[None]:
    """Put the path of a file in front of the messages of ValueErrors raised inside the block."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def check_geometry(peft: dict[str, Any], prefix: Prefix, path: Path) -> None:
    """Check that PEFT's configuration was made for a model with this prefix's layers and heads.

    The size of the tensor does not tell: other layers and heads may have as many numbers.

    Raises:
        ValueError: the numbers differ; path and field are named.
    """
    heads, dim, _ = prefix.shapes[0]
    want = {"num_layers": len(prefix.shapes), "num_attention_heads": heads, "token_dim": heads * dim}
    if prefix.parts[0] is not None:
        del want["num_layers"]  # PEFT counts the encoder's; the decoder may have others
    for name, number in want.items():
        if field(peft, name, int, path, None) not in (None, number):
            raise fail(f"{path}: {name}", shown(peft[name]), f"{number} of this model")


def stored_key_values(tensors: dict[str, Tensor], prefix: Prefix, path: Path) -> tuple[list[Tensor], list[Tensor]]:
    """Keys and values of a prefix's layers from adapter weights, in PEFT's format or one tensor per layer."""
    shapes, tokens = prefix.shapes, prefix.num_virtual_tokens
    if EMBEDDINGS in tensors:
        dims, columns = "[P, 2*L*H_kv*D]", sum(s.numel for s in shapes)
        if prefix.parts[0] is not None:
            found = tensors[EMBEDDINGS]
            whole = found.dim() == 2 and found.shape[1] > 0 and found.shape[1] % shapes[0].numel == 0
            columns = found.shape[1] if whole else shapes[0].numel
        check_tensors(tensors, {EMBEDDINGS: (dims, [tokens, columns])}, path)
        if len(set(shapes)) != 1 or shapes[0].head_dim != shapes[0].value_dim:
            raise fail(
                f"{path}: {EMBEDDINGS}", "one tensor", "one tensor per layer: this model's layers differ in shape"
            )
        return unpack(tensors[EMBEDDINGS], prefix)
    want = {
        f"layers.{i}.{n}": ("[H_kv, P, D]", [shape.num_kv_heads, tokens, dim])
        for i, shape in zip(prefix.layer_indices, shapes, strict=True)
        for n, dim in zip("kv", (shape.head_dim, shape.value_dim), strict=True)
    }
    check_tensors(tensors, {**want, **layer_tensors.wanted_beside(prefix)}, path)
    keys, values = ([tensors[f"layers.{i}.{n}"] for i in prefix.layer_indices] for n in "kv")
    return keys, values
