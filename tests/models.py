"""Tiny random models of every architecture that is claimed to work: one table for the tests and the README."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers

VOCAB = 99
_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GQA = {**_COMMON, "num_key_value_heads": 2}


@dataclass(frozen=True)
class Row:
    """One architecture: how to build it, and whether PEFT computes the same (``peft`` None) or why not."""

    title: str
    cls: str
    config: str
    options: dict[str, Any]
    notes: str = ""
    peft: str | None = None
    content: str = "text"  # or image, sound
    positions_behind: int | None = None  # RoBERTa's: real tokens count from behind its padding id

    @property
    def causal(self) -> bool:
        """Whether it generates."""
        return "CausalLM" in self.cls or "LMHead" in self.cls

    @property
    def paddings(self) -> tuple[str, ...]:
        """How a batch of it can be padded; a sound's mask becomes one of frames, which count from the left."""
        return {"image": ("none",), "sound": ("none", "right")}.get(self.content, ("none", "left", "right"))

    def build(self, dtype: torch.dtype = torch.float32) -> Any:
        """A random model in eval mode, its weights large enough that attention matters."""
        torch.manual_seed(0)
        config = getattr(transformers, self.config)(**self.options)
        model = getattr(transformers, self.cls)(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=0.15)
                elif "norm" not in name.lower() and "ln" not in name.lower():
                    parameter.normal_(std=0.05)
        if dtype == torch.float64 and "experts" in self.notes + self.title + str(self.options):
            model.set_experts_implementation("eager")  # the grouped matmul has no fp64
        return model.to(dtype).eval()


def _row(title: str, family: str, head: str, options: dict[str, Any], config: str | None = None, **kw: Any) -> Row:
    return Row(title, family + head, config or family + "Config", options, **kw)


_SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_VISION = {**_SIZES, "image_size": 32, "patch_size": 8}
_SPEECH = {
    **_SIZES,
    "conv_dim": (16,),
    "conv_kernel": (4,),
    "conv_stride": (2,),
    "num_feat_extract_layers": 1,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "layerdrop": 0.0,
    "mask_time_prob": 0.0,
}
_NO_TOKENS = "prefix tuning is of token ids"
_SLIDING = "prefix is out of sight of a sliding window"
ROWS: dict[str, Row] = {
    "llama_mha": _row("Llama (MHA)", "Llama", "ForCausalLM", _COMMON),
    "llama_gqa": _row("Llama (GQA)", "Llama", "ForCausalLM", _GQA),
    "mistral_window": _row(
        "Mistral", "Mistral", "ForCausalLM", {**_GQA, "sliding_window": 4}, notes="sliding window", peft=_SLIDING
    ),
    "qwen2": _row("Qwen2", "Qwen2", "ForCausalLM", _GQA),
    "qwen3": _row("Qwen3", "Qwen3", "ForCausalLM", {**_GQA, "head_dim": 16}, notes="head dim of its own"),
    "gemma2": _row(
        "Gemma 2", "Gemma2", "ForCausalLM",
        {**_GQA, "head_dim": 16, "sliding_window": 4, "attn_logit_softcapping": 5.0},
        notes="softcap, sliding window", peft=_SLIDING,
    ),
    "gemma3": _row(
        "Gemma 3 (text)", "Gemma3", "ForCausalLM",
        {**_GQA, "head_dim": 16, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
        config="Gemma3TextConfig", notes="mixed windows", peft=_SLIDING,
    ),
    "gpt_oss": _row(
        "gpt-oss", "GptOss", "ForCausalLM",
        {**_GQA, "head_dim": 16, "sliding_window": 4, "num_local_experts": 4, "num_experts_per_tok": 2,
         "layer_types": ["sliding_attention", "full_attention"]},
        notes="attention sinks, mixed windows, experts", peft=_SLIDING,
    ),
    "phi": _row("Phi", "Phi", "ForCausalLM", _GQA),
    "gpt_neox": _row("GPT-NeoX", "GPTNeoX", "ForCausalLM", _COMMON),
    "gpt2": Row(
        "GPT-2", "GPT2LMHeadModel", "GPT2Config",
        {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64,
         "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
        notes="learned positions, attention dropout",
    ),
    "opt": _row(
        "OPT", "OPT", "ForCausalLM",
        {**_COMMON, "ffn_dim": 48, "word_embed_proj_dim": 32}, notes="learned positions",
    ),
    "mixtral": _row(
        "Mixtral", "Mixtral", "ForCausalLM", {**_GQA, "num_local_experts": 4, "num_experts_per_tok": 2}, notes="experts"
    ),
    "deepseek_v3": _row(
        "DeepSeek-V3", "DeepseekV3", "ForCausalLM",
        {**_COMMON, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 12,
         "qk_rope_head_dim": 8, "v_head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2,
         "topk_group": 1, "moe_intermediate_size": 16, "first_k_dense_replace": 1, "n_shared_experts": 1},
        notes="MLA: D = 20, D_v = 8", peft="prefix has one head dim for keys and values",
    ),
    "bert": _row("BERT", "Bert", "Model", _COMMON, notes="bidirectional, learned positions"),
    "roberta": _row(
        "RoBERTa", "Roberta", "Model", {**_COMMON, "pad_token_id": 1},
        notes="bidirectional, positions after padding_idx", positions_behind=1,
    ),
    "distilbert": _row(
        "DistilBERT", "DistilBert", "Model",
        {"vocab_size": VOCAB, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 64},
        notes="bidirectional", peft="prefix needs past_key_values, which it does not take",
    ),
    "vit": _row("ViT", "ViT", "Model", _VISION, notes="images", peft=_NO_TOKENS, content="image"),
    "clip_vision": _row(
        "CLIP (vision)", "CLIPVision", "Model", _VISION, notes="images", peft=_NO_TOKENS, content="image"
    ),
    "wav2vec2": _row("Wav2Vec2", "Wav2Vec2", "Model", _SPEECH, notes="sounds", peft=_NO_TOKENS, content="sound"),
}  # fmt: skip

REFUSED: dict[str, Callable[[], Any]] = {
    "bloom": lambda: transformers.BloomForCausalLM(
        transformers.BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4)
    ),
    "falcon": lambda: transformers.FalconForCausalLM(
        transformers.FalconConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    ),
    "gptj": lambda: transformers.GPTJForCausalLM(
        transformers.GPTJConfig(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, rotary_dim=4)
    ),
    "mpt": lambda: transformers.MptForCausalLM(
        transformers.MptConfig(vocab_size=VOCAB, d_model=32, n_layers=2, n_heads=4)
    ),
    "deberta_v2": lambda: transformers.DebertaV2Model(
        transformers.DebertaV2Config(
            vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
        )
    ),
    "t5": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    ),
}
