"""Causal language models whose layers choose among experts."""

from __future__ import annotations

from tests.model_zoo.row import COMMON, GQA, MIXED, SLIDING, TWO_DIMS, Row, lm

_LOCAL = {**GQA, "num_local_experts": 4, "num_experts_per_tok": 2}
_ROUTED = {**GQA, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_DEEP = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
}
_MLA = {
    **COMMON,
    **_DEEP,
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}

ROWS: dict[str, Row] = {
    "mixtral": lm("Mixtral", "Mixtral", _LOCAL, notes="experts"),
    "qwen2_moe": lm(
        "Qwen2-MoE", "Qwen2Moe", {**_ROUTED, "shared_expert_intermediate_size": 16, "decoder_sparse_step": 1},
        notes="experts",
    ),
    "qwen3_moe": lm("Qwen3-MoE", "Qwen3Moe", {**_ROUTED, "head_dim": 16}, notes="experts"),
    "gpt_oss": lm(
        "gpt-oss", "GptOss", {**_LOCAL, "head_dim": 16, "sliding_window": 4, "layer_types": MIXED},
        notes="attention sinks, mixed windows, experts", peft=SLIDING,
    ),
    "phimoe": lm("Phi-MoE", "Phimoe", _LOCAL, notes="experts"),
    "olmoe": lm("OLMoE", "Olmoe", {**GQA, "num_experts": 4, "num_experts_per_tok": 2}, notes="experts"),
    "granitemoe": lm("Granite-MoE", "GraniteMoe", _LOCAL, notes="experts"),
    "glm4_moe": lm("GLM-4-MoE", "Glm4Moe", {**GQA, **_DEEP, "head_dim": 8}, notes="experts"),
    "dots1": lm("dots.llm1", "Dots1", {**GQA, **_DEEP}, notes="experts"),
    "minimax_m2": lm("MiniMax-M2", "MiniMaxM2", {**_LOCAL, "head_dim": 8}, notes="experts"),
    "deepseek_v2": lm("DeepSeek-V2", "DeepseekV2", _MLA, notes="MLA: D = 20, D_v = 8, experts", peft=TWO_DIMS),
    "deepseek_v3": lm("DeepSeek-V3", "DeepseekV3", _MLA, notes="MLA: D = 20, D_v = 8, experts", peft=TWO_DIMS),
}  # fmt: skip
