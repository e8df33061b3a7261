"""What lies in adapter files: PEFT's tensors and fields, and ours beside them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastprefix.hf.files import field
from fastprefix.hf.probe import Layers
from fastprefix.prefixes import init
from fastprefix.prefixes.config import LayerShape, PrefixConfig
from fastprefix.prefixes.prefix import Prefix
from fastprefix.prefixes.prompt import PromptConfig, SoftPrompt
from fastprefix.validation import fail

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
OWN_CONFIG, ENCODER = "fastprefix_config.json", "prefix_encoder.safetensors"
FORMAT_VERSION = 1
EMBEDDINGS = "prompt_embeddings"
PREFIXES, PROMPTS = ("PREFIX_TUNING", "CARTRIDGE"), ("PROMPT_TUNING", "P_TUNING")

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


def unpack(embeddings: Tensor, shapes: Sequence[LayerShape], step: int = 2) -> tuple[list[Tensor], list[Tensor]]:
    """The inverse of :func:`pack`.

    ``step``: slots between one layer's keys and the next one's, round and round: 4 in PEFT's encoder-decoders, whose
    cache takes a layer's keys and values of cross-attention behind its own, only for PEFT to drop them.
    """
    heads, dim, _ = shapes[0]
    count = 2 * len(shapes)
    slots = embeddings.unflatten(1, (count, heads, dim)).permute(1, 2, 0, 3)  # [2L, H_kv, P, D]
    first = [step * i % count for i in range(len(shapes))]
    return [slots[i].contiguous() for i in first], [slots[i + 1].contiguous() for i in first]


def is_peft(prefix: Prefix, layers: Layers) -> bool:
    """Whether PEFT can represent, and would compute, what this prefix of a model with these layers is."""
    shapes = set(prefix.shapes)
    if any(part is not None for part in prefix.parts):
        return False
    uniform = len(shapes) == 1 and prefix.shapes[0].head_dim == prefix.shapes[0].value_dim
    moves = layers.main.takes_positions and prefix.config.position_offset == "after_prefix"
    return uniform and len(prefix.shapes) == len(layers.modules) and moves


def peft_config(model: Any, prefix: Prefix | SoftPrompt) -> dict[str, Any]:
    """The fields that PEFT reads."""
    name = type(model).__name__
    task = next((t for suffix, t in _TASKS.items() if name.endswith(suffix)), "FEATURE_EXTRACTION")
    common = {
        "task_type": task,
        "base_model_name_or_path": getattr(model.config, "_name_or_path", "") or None,
        "inference_mode": True,
        "num_virtual_tokens": prefix.num_virtual_tokens,
        "num_transformer_submodules": 1,
    }
    if isinstance(prefix, SoftPrompt):
        return {**common, "peft_type": "PROMPT_TUNING", "token_dim": prefix.embedding.shape[1]}
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


def peft_configuration(peft: dict[str, Any], path: Path) -> PrefixConfig | PromptConfig:
    """Our configuration of an adapter of PEFT's; ValueError naming path and field for what is not ours to load."""
    kind = field(peft, "peft_type", str, path)
    if kind not in PREFIXES + PROMPTS:
        raise fail(f"{path}: peft_type", repr(kind), f"{', '.join(PREFIXES + PROMPTS)} or FASTPREFIX")
    submodules = peft.get("num_transformer_submodules", 1)
    tokens = field(peft, "num_virtual_tokens", int, path)
    if kind == "PREFIX_TUNING" and submodules == 2:  # of an encoder-decoder
        return PrefixConfig(tokens, parts=("decoder",))
    if submodules not in (1, None):
        raise fail(f"{path}: num_transformer_submodules", submodules, "1, or 2 of an encoder-decoder's PREFIX_TUNING")
    if kind in PROMPTS:
        return PromptConfig(tokens)
    return PrefixConfig(tokens, num_frozen_tokens=peft.get("num_frozen_tokens", 0) if kind == "CARTRIDGE" else 0)


def own_configuration(own: dict[str, Any], path: Path) -> PrefixConfig | PromptConfig:
    """The configuration that :func:`save` wrote; ValueError naming path and field when it is malformed."""
    if own.get("format_version") != FORMAT_VERSION:
        raise fail(f"{path}: format_version", own.get("format_version"), str(FORMAT_VERSION))
    if own.get("kind") == "prompt":
        return PromptConfig(field(own, "num_virtual_tokens", int, path))
    fields: dict[str, Any] = {
        n: own[n] for n in ("num_virtual_tokens", "layers", "position_offset", "num_frozen_tokens", "parts") if n in own
    }
    if own.get("projected"):
        fields.update(prefix_projection=True, encoder_hidden_size=own.get("encoder_hidden_size"))
    try:
        return PrefixConfig(**fields, init=init.normal())
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def stored_key_values(tensors: dict[str, Tensor], prefix: Prefix, path: Path) -> tuple[list[Tensor], list[Tensor]]:
    """Keys and values of a prefix's layers from adapter weights, in PEFT's form or one tensor a layer."""
    if EMBEDDINGS in tensors:
        embeddings, shapes = tensors[EMBEDDINGS], prefix.shapes
        want = [prefix.num_virtual_tokens, sum(s.numel for s in shapes)]
        if list(embeddings.shape) != want:
            raise fail(
                f"{path}: {EMBEDDINGS}", f"shape {list(embeddings.shape)}", f"[P, 2*L*H_kv*D] = {want} of this model"
            )
        if len(set(shapes)) != 1 or shapes[0].head_dim != shapes[0].value_dim:
            raise fail(
                f"{path}: {EMBEDDINGS}", "one tensor", "one tensor per layer: this model's layers differ in shape"
            )
        return unpack(embeddings, shapes, step=2 if prefix.parts[0] is None else 4)
    found: tuple[list[Tensor], list[Tensor]] = ([], [])
    for i, shape in zip(prefix.layer_indices, prefix.shapes, strict=True):
        for out, n, dim in zip(found, "kv", (shape.head_dim, shape.value_dim), strict=True):
            key, want = f"layers.{i}.{n}", [shape.num_kv_heads, prefix.num_virtual_tokens, dim]
            if key not in tensors:
                raise fail(f"{path}: {key}", "no such tensor", f"{EMBEDDINGS}, or keys and values of every layer")
            if list(tensors[key].shape) != want:
                raise fail(
                    f"{path}: {key}", f"shape {list(tensors[key].shape)}", f"[H_kv, P, D] = {want} of this model"
                )
            out.append(tensors[key])
    return found


def stored_embedding(tensors: dict[str, Tensor], prompt: SoftPrompt, path: Path) -> Tensor:
    """A soft prompt's embeddings ``[P, d]`` from adapter weights."""
    want = list(prompt.embedding.shape)
    if EMBEDDINGS not in tensors or list(tensors[EMBEDDINGS].shape) != want:
        got = f"shape {list(tensors[EMBEDDINGS].shape)}" if EMBEDDINGS in tensors else "no such tensor"
        raise fail(f"{path}: {EMBEDDINGS}", got, f"[P, d] = {want} of this model")
    return tensors[EMBEDDINGS]


def digest(tensors: dict[str, Tensor]) -> str:
    """What tells adapter weights from others."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(name.encode())
        found.update(tensors[name].contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
