"""Causal language models some of whose layers keep a state in place of keys and values."""

from __future__ import annotations

from typing import Any

from tests.model_zoo.row import COMMON, GQA, STATES, TWO_DIMS, Row, lm

_HYBRID = ["linear_attention", "full_attention"]
_DELTA = {
    "layer_types": _HYBRID,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 0], "partial_rotary_factor": 0.25}
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 4, "mamba_chunk_size": 4, "mamba_n_groups": 1}
_ZAMBA = {
    **COMMON,
    "num_key_value_heads": 4,
    "num_hidden_layers": 3,
    "layers_block_type": ["hybrid", "linear_attention", "hybrid"],
    "mamba_d_state": 4,
}


def _row(
    title: str, family: str, options: dict[str, Any], layers: str, config: str | None = None, peft: str = STATES
) -> Row:
    return lm(title, family, options, config, notes=f"hybrid: attention in {layers}", peft=peft)


ROWS: dict[str, Row] = {
    "qwen3_next": _row(
        "Qwen3-Next", "Qwen3Next",
        {**GQA, **_DELTA, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
         "shared_expert_intermediate_size": 16},
        "every fourth layer",
    ),
    "qwen3_5": _row(
        "Qwen3.5 (text)", "Qwen3_5", {**GQA, **_DELTA, "head_dim": 16, "rope_parameters": _ROPE},
        "every fourth layer", "Qwen3_5TextConfig",
    ),
    "olmo_hybrid": _row("OLMo hybrid", "OlmoHybrid", {**GQA, **_DELTA}, "every fourth layer"),
    "jamba": _row(
        "Jamba", "Jamba",
        {**GQA, "num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
         "expert_layer_offset": 1, "num_experts": 2, "num_experts_per_tok": 1, "mamba_d_state": 4, "mamba_d_conv": 2,
         "mamba_dt_rank": 4, "use_mamba_kernels": False},
        "every eighth layer",
    ),
    "bamba": _row("Bamba", "Bamba", {**GQA, **_MAMBA, "attn_layer_indices": [1]}, "the layers its config names"),
    "granitemoehybrid": _row(
        "Granite hybrid", "GraniteMoeHybrid",
        {**GQA, **_MAMBA, "layer_types": _HYBRID, "num_local_experts": 2, "num_experts_per_tok": 1,
         "shared_intermediate_size": 16, "position_embedding_type": "rope"},
        "the layers its config names",
    ),
    "zamba": _row(
        "Zamba", "Zamba",
        {**_ZAMBA, "n_mamba_heads": 2, "use_mamba_kernels": False, "attention_head_dim": 16},
        "every sixth layer, of tied weights", peft=TWO_DIMS,
    ),
    "zamba2": _row(
        "Zamba2", "Zamba2",
        {**_ZAMBA, "layers_block_type": ["linear_attention", "hybrid", "hybrid"], "n_mamba_heads": 4,
         "mamba_headdim": 16, "chunk_size": 4, "num_mem_blocks": 1, "mamba_ngroups": 1, "use_mem_rope": True,
         "adapter_rank": 4},
        "every sixth layer, of tied weights",
    ),
    "lfm2": _row(
        "LFM2", "Lfm2", {**GQA, "layer_types": ["conv", "full_attention"], "conv_L_cache": 3},
        "the layers its config names",
    ),
    "falcon_h1": _row(
        "Falcon-H1", "FalconH1", {**GQA, **_MAMBA, "mamba_d_ssm": 32, "mamba_d_head": 8, "head_dim": 8},
        "every layer, beside a state",
    ),
    "nemotron_h": _row(
        "Nemotron-H", "NemotronH",
        {**GQA, "num_hidden_layers": 3, "hybrid_override_pattern": "M*-", "mamba_num_heads": 4, "mamba_head_dim": 16,
         "ssm_state_size": 4, "n_groups": 1, "chunk_size": 4, "head_dim": 8},
        "the layers its config names",
    ),
    "recurrent_gemma": _row(
        "RecurrentGemma", "RecurrentGemma",
        {**COMMON, "num_key_value_heads": 1, "lru_width": 32, "attention_window_size": 8,
         "block_types": ["recurrent", "attention"]},
        "every third layer, windows", peft="prefix has slots for layers without attention",
    ),
}  # fmt: skip
