"""A tiny config of any class of configs: sizes shrunk by what fields are called, a few classes by name."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import transformers

from tests.sweep.models import overrides

VOCAB = 128
HIDDEN = 64
# Sizes by the name of their field, the first that fits; a size is never made larger.
_SIZES: list[tuple[str, int]] = [
    (r"^moe_k$|^moe_topk$", 2),
    (r"^index_topk$", 64),
    (r"^rotary_dim$", 8),
    (r"^upsample_groups$", HIDDEN),
    (r"^mamba_n_heads$|^mamba_num_heads$", 8),
    (r"type_vocab_size|additional_vocab_size", 2),
    (r"vocab_size$|vocab_size_per_layer_input$|^n_vocab$|^embedding_rank$", VOCAB),
    (r"num_key_value_heads$|num_kv_heads$|kv_n_heads$|num_query_groups$|num_key_value_attention_heads$", 2),
    (r"(attention_|_)heads$|^n_heads?$|^num_heads$|^heads$|_n_heads$|num_attention_heads$", 4),
    (r"^num_kv_shared_layers$|^first_k_dense_replace$|^num_dense_layers$|^max_window_layers$|start_index$", 1),
    (r"layers$|^n_layers?$|^depth$|^num_blocks$|_depth$|^layers$|num_self_attends_per_block$", 2),
    (r"qk_rope_head_dim$", 8),
    (r"qk_head_dim$", 24),
    (r"head_dim$|^d_kv$|^kv_channels$|^attention_head_size$|^d_head$|dim_head$|^mamba_headdim$|mamba_d_head$", 16),
    (r"(experts_per_tok(en)?|top_?k|topk_method)$", 2),
    (r"^n_group$|^topk_group$|^num_expert_group$", 1),
    (r"experts$|n_routed_experts|^zero_expert_num$", 4),
    (r"lora_rank$|low_?rank$|^adapter_rank$|^laurel_rank$", 16),
    (r"(^|_)(intermediate_size|ffn_dim|ffn_hidden_size|d_ff|ff_dim|dim_ff|dff|mlp_dim|n_inner|d_inner|linear_units)"
     r"|feed_?forward|intermediate_dim|inner_dim", HIDDEN),
    (r"max_source_positions$", 16),
    (r"max_.*(position|seq_len|length|tokens)|position_embeddings$|^n_positions$|^n_ctx$|context_length$|n_ctx$", 128),
    (r"relative_attention|num_buckets$|position_buckets$", 8),
    (r"(mel_bins|n_mels|^num_mel|mel_dim|freq_bins)", 16),
    (r"^feature_size$|^input_feat", 16),
    (r"image_size$|img_size$|^crop_size$", 32),
    (r"num_position_embeddings$", 16),
    (r"sliding_window$|attention_chunk_size$|^local_attention$|sliding_window_size$", 64),
    (r"conv_pos_embedding_groups$", 2),
    (r"conv_pos_embeddings$", 4),
    (r"linear_.*head_dim$|swa_head_dim|index_head_dim", 16),
    (r"linear_num_.*heads$|index_n_heads$", 4),
    (r"(hidden|embed|emb|latent|proj|projection|model|word_embed|out|output|state)?_?(size|dim|dims|width)(_global)?$",
     HIDDEN),
    (r"^d_model$|^n_embd$|^hidden_size$|^dim$|^embed_dim$|channels$|_units$|d_latents$|^lru_width$", HIDDEN),
    (r"num_queries$|num_query_tokens$|num_latents$|_latents$|latent_query_num$", 8),
    (r"depthwise|codevectors_per_group$", 8),
]  # fmt: skip
_STAGES = (
    "depths",
    "num_heads",
    "num_attention_heads",
    "hidden_sizes",
    "embed_dims",
    "patch_sizes",
)  # lists that are no lists by layer
_KEPT = re.compile(
    r"patch_size|kernel|stride|merge_size|window_size|_ratio|codebook_size|chunk_size|factor|dtype|temporal|"
    r"num_feat_extract_layers|block_size|type_vocab|in_channels|num_channels|batch_size|step|sample_size|n_groups|conv_dim$|ngram"
)
# What models need that is None where nothing is said.
_ABSENT = {
    "head_dim": 16, "num_key_value_heads": 2, "n_routed_experts": 4, "num_experts": 4, "num_experts_per_tok": 2,
    "topk_group": 1, "n_group": 1, "n_shared_experts": 1, "pad_token_id": 0,
}  # fmt: skip
_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
_TOKEN = re.compile(r"(token_id|token_index|_id|_index|_token)$")


def tiny(config_class: Any, fields: dict[str, Any] | None = None) -> Any:
    """A config of this class with two layers of 64 numbers (four where kinds of layers alternate)."""
    special = {**overrides.BY_CONFIG.get(config_class.__name__, {}), **(fields or {})}
    try:
        default = config_class()
    except Exception:
        return config_class(**special)
    return config_class(**shrunk(default, special))


def shrunk(default: Any, special: dict[str, Any]) -> dict[str, Any]:
    """The keywords that make a config like this one tiny."""
    found: dict[str, Any] = {}
    fields = {name: value for name, value in vars(default).items() if not name.startswith("_")}
    fields["_source"] = _source(type(default))
    for name, value in list(fields.items()):
        small = _small(name, value, fields)
        if small is not None:
            found[name] = small
    if "qk_rope_head_dim" in found and fields.get("head_dim") == fields["qk_rope_head_dim"]:
        found["head_dim"] = found["qk_rope_head_dim"]
    _layers(fields, found)
    for name, value in special.items():
        found[name] = tiny(getattr(transformers, value)) if str(value).endswith("Config") else value
    return found


def _small(name: str, value: Any, fields: dict[str, Any]) -> Any:
    if value is None:
        return _ABSENT.get(name)
    if isinstance(value, transformers.PreTrainedConfig):
        return tiny(type(value))
    if name == "rope_parameters" and isinstance(value, dict):
        return _rope(value, fields.get("_source", ""))
    if name == "conv_dim" and isinstance(value, list | tuple):
        return type(value)(32 for _ in value)
    if name == "image_size" and isinstance(value, list | tuple):
        return type(value)(32 for _ in value)
    if name == "intermediate_size" and isinstance(value, list | tuple):
        return type(value)(HIDDEN for _ in value)
    if name == "depths" and isinstance(value, list | tuple):
        return type(value)(min(x, 2) for x in value)
    if name in ("num_heads", "num_attention_heads") and isinstance(value, list | tuple):
        return type(value)(min(x, 4) if x % 3 else 4 for x in value)
    if isinstance(value, bool) or not isinstance(value, int):
        if name in ("forced_eos_token_id", "forced_bos_token_id"):
            return None
        if isinstance(value, list) and value and name == "eos_token_id":
            return 2
        return None
    return _number(name, value, fields)


def _number(name: str, value: int, fields: dict[str, Any]) -> int | None:
    if name in _SPECIAL:
        return _SPECIAL[name]
    if _TOKEN.search(name) and value > 2:
        return 3 + sum(map(ord, name)) % (VOCAB - 30) if value >= VOCAB - 30 else None
    if name == "patch_size":
        return min(value, 8)
    if _KEPT.search(name):
        return None
    if name == "num_key_value_heads" and value == fields.get("num_attention_heads"):
        return min(value, 4)
    for pattern, size in _SIZES:
        if re.search(pattern, name):
            return min(value, size) if value > 0 else None
    return None


def _rope(parameters: dict[str, Any], source: str) -> dict[str, Any]:
    """The same kind of rotary positions for heads of 16."""
    found = {k: _rope(v, source) if isinstance(v, dict) else v for k, v in parameters.items()}
    if "mrope_section" in found or ("rope_theta" in found and "mrope_section" in source):
        own, half = found.get("mrope_section"), found.get("partial_rotary_factor", 1.0) < 1.0
        if own is not None and len(own) == 4:
            sections = [2, 2, 2, 2]
        elif own is not None and own[0] == own[1]:
            sections = [3, 3, 2]
        else:
            sections = [4, 2, 2]
        found["mrope_section"] = [2, 1, 1] if half else sections
    return found


def _source(config_class: Any) -> str:
    """Of a config's models, which may have defaults of their own for fields that are not there."""
    file = Path(inspect.getfile(config_class))
    models = file.with_name(file.name.replace("configuration_", "modeling_"))
    return models.read_text() if models.exists() else ""


def _layers(fields: dict[str, Any], found: dict[str, Any]) -> None:
    """Lists by layer cut to the number of layers, so that every kind of layer stays."""
    lists = {k: v for k, v in fields.items() if k not in _STAGES and _by_layer(v, fields)}
    if not lists:
        return
    kinds = fields.get("layer_types") or fields.get("layers_block_type")
    if kinds and len(set(kinds)) > 1:
        chosen = [kinds.index(kind) for kind in dict.fromkeys(kinds)]
        # Twice each kind, the way they alternate.
        chosen = sorted([*chosen, *(max(i for i, k in enumerate(kinds) if k == kind) for kind in set(kinds))])
    else:
        chosen = [0, 1]
        for values in lists.values():
            chosen = sorted({*chosen, *(list(values).index(v) for v in _distinct(values))})[:4]
    for name, values in lists.items():
        values = found.get(name, values)
        found[name] = type(values)(values[i] for i in chosen)
    for name in ("num_hidden_layers", "num_layers", "n_layers", "n_layer"):
        if name in fields and isinstance(fields[name], int):
            found[name] = len(chosen)


def _distinct(values: Any) -> list[Any]:
    found: list[Any] = []
    for value in values:
        if value not in found:
            found.append(value)
    return found if len(found) <= 3 else []


def _by_layer(values: Any, fields: dict[str, Any]) -> bool:
    layers = fields.get("num_hidden_layers") or fields.get("n_layers") or fields.get("num_layers")
    return isinstance(values, list | tuple) and isinstance(layers, int) and len(values) == layers and layers > 2
