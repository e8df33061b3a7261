"""Fields of configs that shrinking by name gets wrong: sizes that belong to each other, and what has no default."""

from __future__ import annotations

from typing import Any

_MIXED = ["linear_attention", "full_attention"]

_SWIN = {"depths": (2, 2), "num_heads": (2, 4), "window_size": 2, "embed_dim": 32}

BY_CONFIG: dict[str, Any] = {
    **dict.fromkeys(("SwinConfig", "Swinv2Config", "DonutSwinConfig", "MaskFormerSwinConfig", "Swin2SRConfig"), _SWIN),
    "AriaConfig": {"projector_patch_to_query_dict": {16: 4}},
    "AutoformerConfig": {"prediction_length": 4},
    "BailingHybridConfig": {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "BambaConfig": {"attn_layer_indices": [1], "mamba_d_head": 16, "mamba_n_heads": 8},
    "BltConfig": {"encoder_hash_byte_group_vocab": 64},
    "ChameleonConfig": {"vocabulary_map": {"<image>": 100}},
    "CohereCompassTextConfig": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "DbrxConfig": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 64, "hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2}},
    "DeepseekOcr2TextConfig": {"mlp_layer_types": ["dense", "sparse"]},
    "DiffusionGemmaTextConfig": {"moe_intermediate_size": 64, "top_k_experts": 2},
    "Emu3Config": {"vocabulary_map": {"<image>": 100}},
    "Ernie4_5_VLMoeTextConfig": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e5, "mrope_section": [3, 3, 2]}},
    "EsmConfig": {"vocab_size": 128, "pad_token_id": 0, "mask_token_id": 120},
    "EsmcConfig": {"vocab_size": 128},
    "FalconH1Config": {"mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": 16},
    "FunAsrNanoAdaptorConfig": {"intermediate_size": 16},
    "Gemma3Config": {"mm_tokens_per_image": 4},
    "Gemma4Config": {"vision_config": "Gemma4VisionConfig", "audio_config": "Gemma4AudioConfig"},
    "Granite4VisionConfig": {"deepstack_layer_map": [[0, 0]], "downsample_rate": "1/2"},
    "GraniteMoeHybridConfig": {"layer_types": ["mamba", "attention"], "mamba_d_head": 16, "mamba_n_heads": 8},
    "InformerConfig": {"prediction_length": 4},
    "KimiLinearConfig": {"num_experts_per_token": 2, "num_experts_per_tok": 2},
    "Lfm2MoeConfig": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "Llama4VisionConfig": {"intermediate_size": 256},
    "LlavaNextConfig": {"image_grid_pinpoints": [[32, 32]]},
    "LlavaNextVideoConfig": {"image_grid_pinpoints": [[32, 32]]},
    "LlavaOnevisionConfig": {"image_grid_pinpoints": [[32, 32]]},
    "Mamba2Config": {"num_heads": 8, "head_dim": 16},
    "MistralLarge4TextConfig": {"kv_source_layers": [0, 1], "num_hidden_layers": 2, "indexer_types": ["full", "full"],
        "layer_types": ["indexed_attention"] * 2, "mlp_layer_types": ["dense", "sparse"], "no_rope_layers": [1, 1]},
    "Molmo2AdapterConfig": {"vision_feature_layer": [-1, -2]},
    "MoonshineStreamingConfig": {"num_key_value_heads": 4},
    "Qwen3OmniMoeTalkerTextConfig": {"shared_expert_intermediate_size": 64},
    "Qwen4ExpTextConfig": {"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 16,
        "indexer_budget": 64, "indexer_compress_ratio": 1, "hc_lowrank": 16},
    "ReformerConfig": {"axial_pos_embds_dim": (32, 32), "axial_pos_shape": (4, 4), "lsh_attn_chunk_length": 4,
        "local_attn_chunk_length": 4, "num_buckets": 4},
    "Step3p7TextConfig": {"sliding_window": 64},
    "T5Gemma2EncoderConfig": {"mm_tokens_per_image": 4},
    "TimeSeriesTransformerConfig": {"prediction_length": 4},
    "VipLlavaConfig": {"vision_feature_layers": [-1, -2]},
    "VoxtralConfig": {"audio_token_id": 100},
    "Zamba2Config": {"mamba_headdim": 16, "n_mamba_heads": 8, "mamba_ngroups": 1,
        "attention_hidden_size": 128, "attention_head_dim": 32},
    "ZambaConfig": {"attention_hidden_size": 128, "attention_head_dim": 32},
}  # fmt: skip

# Configs of a class that work in another way than its default: "class, what is special" and the fields.
VARIANTS: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM, dynamic RoPE": {"max_position_embeddings": 8,
        "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
    "Phi3ForCausalLM, long RoPE": {"max_position_embeddings": 64, "original_max_position_embeddings": 8,
        "rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8,
            "long_factor": [2.0] * 8, "original_max_position_embeddings": 8}},
    "LlamaForCausalLM, YaRN": {"max_position_embeddings": 64, "rope_parameters": {"rope_type": "yarn", "factor": 4.0,
        "rope_theta": 1e4, "original_max_position_embeddings": 16}},
    "MistralForCausalLM, window of 4": {"sliding_window": 4},
    "Gemma3ForCausalLM, window of 4": {"sliding_window": 4},
    "BertLMHeadModel, decoder": {"is_decoder": True},
    "FalconForCausalLM, ALiBi": {"alibi": True},
}  # fmt: skip
