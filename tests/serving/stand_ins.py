"""Stand-ins for vLLM's configuration and requests, with the fields that are read, for tests without vLLM."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace as Fields
from typing import Any

import torch


def model_config(**changed: Any) -> Any:
    text = Fields(model_type="llama", **changed.pop("text", {}))
    fields: dict[str, Any] = {
        "model": "MODEL",
        "hf_text_config": text,
        "runner_type": "generate",
        "dtype": torch.float32,
        "max_model_len": 64,
        "enable_return_routed_experts": False,
        "get_vocab_size": lambda: 32,
        "get_hidden_size": lambda: 32,
        "get_head_size": lambda: 8,
        "get_total_num_kv_heads": lambda: 2,
        "get_total_num_hidden_layers": lambda: 2,
    }
    names = ("is_encoder_decoder", "is_attention_free", "is_hybrid", "use_mla", "uses_alibi", "uses_mrope")
    return Fields(**{**dict.fromkeys(names, False), **fields, **changed})


def vllm_config(extra: dict[str, Any] | None = None, **changed: Any) -> Any:
    given = extra or {}
    transfer = Fields(
        kv_load_failure_policy="fail", get_from_extra_config=lambda name, default: given.get(name, default)
    )
    fields: dict[str, Any] = {
        "model_config": model_config(),
        "kv_transfer_config": transfer,
        "parallel_config": Fields(),
        "speculative_config": None,
        "use_v2_model_runner": False,
    }
    return Fields(**{**fields, **changed})


def with_adapters(folder: Path, **changed: Any) -> Any:
    return vllm_config({"adapters": str(folder), "spool": str(folder.parent / "spool")}, **changed)


def params(**changed: Any) -> Any:
    fields: dict[str, Any] = {
        "extra_args": None,
        "max_tokens": 10,
        "min_tokens": 0,
        "n": 1,
        "prompt_logprobs": None,
        "repetition_penalty": 1.0,
        "skip_reading_prefix_cache": False,
    }
    return Fields(**{**fields, **changed})


def process_inputs(request_id: str, prompt: list[int], params: Any, **kwargs: Any) -> Any:
    """As vLLM's input processor does: checks belong to it, and are not here."""
    return Fields(
        request_id=request_id,
        prompt_token_ids=list(prompt),
        prompt_embeds=None,
        mm_features=None,
        sampling_params=params,
        cache_salt=None,
    )
