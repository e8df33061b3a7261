"""Causal language models and decoders of text."""

from __future__ import annotations

from tests.model_zoo.row import COMMON, GPT, GQA, MIXED, SLIDING, VOCAB, Row, lm, row

_HEAD_DIM = {**GQA, "head_dim": 16}
_MIXED = {**_HEAD_DIM, "sliding_window": 4, "layer_types": MIXED}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 16.0,
    "original_max_position_embeddings": 16,
    "max_position_embeddings": 64,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale_all_dim": 1.0,
    "mscale": 1.0,
    "llama_4_scaling_beta": 0.1,
}


def _sections(*sizes: int) -> dict[str, object]:
    """Rotary positions in the three sections of a model of pictures."""
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": list(sizes)}}


_SHARED = {**_MIXED, "num_hidden_layers": 4, "layer_types": MIXED * 2, "num_kv_shared_layers": 2}
_SHARES = "layers that share keys and values have no prefix of their own"
_PER_LAYER = {"vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 8}

ROWS: dict[str, Row] = {
    "llama_mha": lm("Llama (MHA)", "Llama", COMMON),
    "llama_gqa": lm("Llama (GQA)", "Llama", GQA),
    "llama4": lm(
        "Llama 4 (text)", "Llama4",
        {**_HEAD_DIM, "intermediate_size_mlp": 48, "num_local_experts": 2, "attention_chunk_size": 4,
         "no_rope_layers": [1, 0], "interleave_moe_layer_step": 2},
        "Llama4TextConfig", notes="chunks, experts, layers without positions", peft=SLIDING,
    ),
    "mistral_window": lm("Mistral", "Mistral", {**GQA, "sliding_window": 4}, notes="sliding window", peft=SLIDING),
    "ministral": lm("Ministral", "Ministral", _MIXED, notes="mixed windows", peft=SLIDING),
    "ministral3": lm(
        "Ministral 3", "Ministral3", {**_HEAD_DIM, "rope_parameters": _YARN}, notes="queries scaled by position"
    ),
    "qwen2": lm("Qwen2, 2.5", "Qwen2", GQA),
    "qwen3": lm("Qwen3", "Qwen3", _HEAD_DIM, notes="head dim of its own"),
    "qwen2_vl": row("Qwen2-VL (text)", "Qwen2VLText", "Model", {**GQA, **_sections(2, 1, 1)}, decoder=True),
    "qwen2_5_vl": row("Qwen2.5-VL (text)", "Qwen2_5_VLText", "Model", {**GQA, **_sections(2, 1, 1)}, decoder=True),
    "qwen3_vl": row("Qwen3-VL (text)", "Qwen3VLText", "Model", {**_HEAD_DIM, **_sections(4, 2, 2)}, decoder=True),
    "gemma": lm("Gemma", "Gemma", _HEAD_DIM),
    "gemma2": lm(
        "Gemma 2", "Gemma2", {**_HEAD_DIM, "sliding_window": 4, "attn_logit_softcapping": 5.0},
        notes="softcap, sliding window", peft=SLIDING,
    ),
    "gemma3": lm("Gemma 3 (text)", "Gemma3", _MIXED, "Gemma3TextConfig", notes="mixed windows", peft=SLIDING),
    "gemma3n": lm(
        "Gemma 3n (text)", "Gemma3n",
        {**_SHARED, **_PER_LAYER, "laurel_rank": 4, "altup_num_inputs": 2, "activation_sparsity_pattern": [0.0] * 4,
         "intermediate_size": [48] * 4},
        "Gemma3nTextConfig", notes="mixed windows, layers that share keys and values", peft=_SHARES,
        modes=(False,),
    ),
    "gemma4": lm(
        "Gemma 4 (text)", "Gemma4", {**_SHARED, **_PER_LAYER, "head_dim": 8, "global_head_dim": 16},
        "Gemma4TextConfig", notes="the same, and head dims of 8 and 16", peft=_SHARES, modes=(False,),
    ),
    "phi": lm("Phi", "Phi", GQA),
    "phi3": lm("Phi-3", "Phi3", GQA, notes="fused projections"),
    "olmo": lm("OLMo", "Olmo", GQA),
    "olmo2": lm("OLMo 2", "Olmo2", GQA),
    "olmo3": lm("OLMo 3", "Olmo3", _MIXED, notes="mixed windows", peft=SLIDING),
    "granite": lm("Granite", "Granite", GQA, notes="a scale of its own"),
    "cohere": lm("Cohere", "Cohere", GQA),
    "cohere2": lm("Cohere 2", "Cohere2", _MIXED, notes="mixed windows, layers without positions", peft=SLIDING),
    "starcoder2": lm("StarCoder2", "Starcoder2", {**GQA, "sliding_window": 4}, notes="sliding window", peft=SLIDING),
    "smollm3": lm("SmolLM3", "SmolLM3", {**GQA, "no_rope_layers": [1, 0]}, notes="layers without positions"),
    "glm": lm("GLM", "Glm", {**GQA, "head_dim": 8}, notes="half of a head rotates"),
    "glm4": lm("GLM-4", "Glm4", {**GQA, "head_dim": 8}),
    "nemotron": lm("Nemotron", "Nemotron", {**GQA, "head_dim": 8}),
    "helium": lm("Helium", "Helium", {**GQA, "head_dim": 8}),
    "stablelm": lm("StableLM", "StableLm", GQA),
    "exaone4": lm("EXAONE 4", "Exaone4", {**_MIXED, "head_dim": 8}, notes="mixed windows", peft=SLIDING),
    "seed_oss": lm("Seed-OSS", "SeedOss", {**GQA, "head_dim": 8}),
    "apertus": lm("Apertus", "Apertus", GQA),
    "ernie4_5": lm("ERNIE 4.5", "Ernie4_5", {**GQA, "head_dim": 8}),
    "hunyuan": lm("HunYuan (dense)", "HunYuanDenseV1", {**GQA, "head_dim": 8}),
    "gpt_neox": lm("GPT-NeoX", "GPTNeoX", COMMON),
    "gpt2": row("GPT-2", "GPT2", "LMHeadModel", GPT, notes="learned positions, attention dropout"),
    "gpt_bigcode": lm("GPT-BigCode", "GPTBigCode", GPT, notes="learned positions, one key/value head"),
    "opt": lm("OPT", "OPT", {**COMMON, "ffn_dim": 48, "word_embed_proj_dim": 32}, notes="learned positions"),
    "biogpt": lm("BioGPT", "BioGpt", COMMON, notes="learned positions"),
    "modernbert_decoder": lm(
        "ModernBERT decoder", "ModernBertDecoder", {**COMMON, "local_attention": 8, "layer_types": MIXED},
        notes="mixed windows", peft=SLIDING,
    ),
    "gptj": lm("GPT-J", "GPTJ", {**GPT, "rotary_dim": 4}, notes="one method overridden", cached=True),
    "codegen": lm("CodeGen", "CodeGen", {**GPT, "rotary_dim": 4}, notes="one method overridden", cached=True),
    "gpt_neo": lm(
        "GPT-Neo", "GPTNeo",
        {**COMMON, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 32},
        notes="one method overridden; local layers", cached=True,
    ),
    "falcon": lm(
        "Falcon (7B, 40B)", "Falcon", {**COMMON, "num_kv_heads": 2, "new_decoder_architecture": True},
        notes="one method overridden", cached=True, peft="prefix has the queries' heads, not the groups'",
    ),
}  # fmt: skip
