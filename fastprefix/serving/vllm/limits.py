"""Which models and which options of vLLM a prefix cannot be served with, and why; and what is known of those it can.

Everything here reads vLLM's own configuration, when the server starts. Windows, ALiBi and other attentions would treat
the prefix as so many tokens of text, where it was trained as something that every token sees.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import torch

from fastprefix.errors import fail
from fastprefix.serving.vllm.geometry import Geometry, Rotate, rotation

# Rotary frequencies of these kinds are the same for every length of a text.
_CONSTANT = ("default", "linear", "llama3", "yarn")
_DRAFTLESS = ("ngram", "ngram_gpu", "suffix")  # methods of speculative decoding without a model of their own


def reasons(vllm_config: Any) -> list[str]:
    """Why prefixes cannot be served with this configuration; empty where they can."""
    return [*_of_model(vllm_config.model_config), *_of_options(vllm_config)]


def check(vllm_config: Any) -> None:
    """Raise ValueError with all reasons, unless there are none."""
    if found := reasons(vllm_config):
        raise fail(
            "model", f"{vllm_config.model_config.model}, which has {'; '.join(found)}", "none of these with prefixes"
        )


def _of_model(model: Any) -> Iterator[str]:
    text = model.hf_text_config
    if model.runner_type != "generate":
        yield f"no generation (it runs as {model.runner_type})"
    if model.is_encoder_decoder:
        yield "an encoder and a decoder (the prefix of each part is its own)"
    if model.is_attention_free or model.is_hybrid:
        yield "layers without attention, whose state a prefix of keys and values does not give"
    if model.use_mla:
        yield "multi-head latent attention (its cache holds no keys and values)"
    if model.uses_alibi:
        yield "ALiBi (its biases would count the prefix's tokens as text)"
    window = getattr(text, "sliding_window", None)
    if window and getattr(text, "use_sliding_window", True):
        yield f"a sliding window of {window} tokens (the prefix would slide out of it)"
    if chunk := getattr(text, "attention_chunk_size", None):
        yield f"chunked attention of {chunk} tokens (later chunks would not see the prefix)"
    if getattr(text, "num_kv_shared_layers", 0):
        yield "layers that share keys and values"
    if model.uses_mrope:
        yield "positions in several dimensions"


def _of_options(vllm_config: Any) -> Iterator[str]:
    transfer, parallel = vllm_config.kv_transfer_config, vllm_config.parallel_config
    if transfer.kv_load_failure_policy != "fail":
        yield f"kv_load_failure_policy {transfer.kv_load_failure_policy!r} (placeholder tokens cannot be computed)"
    speculative = vllm_config.speculative_config
    if speculative is not None and speculative.method not in _DRAFTLESS:
        yield f"speculative decoding by {speculative.method!r} (the draft's layers have no prefix)"
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, name, 1) > 1:
            yield f"{name} {getattr(parallel, name)} (a prefix is not split over tokens)"
    if getattr(vllm_config.model_config, "enable_return_routed_experts", False):
        yield "enable_return_routed_experts (its rows would count placeholder tokens)"


def check_cache(vllm_config: Any, kv_cache_config: Any) -> None:
    """Hold what the engine has made of the model against what a prefix needs.

    Raises:
        ValueError: the layers' caches are not all of one kind, of full attention, or of other sizes than the front end
        takes.
    """
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    model, groups = vllm_config.model_config, kv_cache_config.kv_cache_groups
    specs = [group.kv_cache_spec for group in groups]
    kinds = ", ".join(sorted({type(spec).__name__ for spec in specs}))
    if len(specs) != 1 or not isinstance(specs[0], FullAttentionSpec):
        raise fail("model", f"{model.model}, whose layers have caches of {kinds}", "one group of full attention")
    spec = specs[0]
    if spec.sliding_window or spec.attention_chunk_size or spec.non_causal:
        raise fail("model", f"{model.model}, some of whose layers see parts of a text", "full attention in all")
    layers = model.get_num_layers(vllm_config.parallel_config)
    sizes = {spec.head_size, spec.head_size_v or spec.head_size}
    if len(groups[0].layer_names) != layers or sizes != {model.get_head_size()}:
        got = f"{len(groups[0].layer_names)} layers of head sizes {sorted(sizes)}"
        raise fail(
            "model", f"{model.model} with {got}", f"{layers} of {model.get_head_size()}, as its configuration says"
        )


def geometry(vllm_config: Any) -> Geometry:
    """The sizes of the served model."""
    model = vllm_config.model_config
    rotate, why = _rotation(model)
    return Geometry(
        model.model,
        model.get_total_num_hidden_layers(),
        model.get_total_num_kv_heads(),
        model.get_head_size(),
        model.get_hidden_size(),
        model.dtype,
        rotate,
        why,
    )


def _rotation(model: Any) -> tuple[Rotate | None, str]:
    """How the model's keys are moved on by positions, or why that is not known."""
    config = model.hf_text_config
    kind = getattr(config, "model_type", "")
    try:
        module = importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")
        halves = module.rotate_half(torch.arange(4.0)).tolist() == [-2.0, -3.0, 0.0, 1.0]
        embedding = next(x for name, x in vars(module).items() if name.endswith("RotaryEmbedding"))
        with torch.device("cpu"):
            made = embedding(config=config)
        rope = made.rope_type
    except (ImportError, AttributeError, KeyError, StopIteration, TypeError, ValueError):
        return None, f"{kind} has no rotary positions of a known kind"
    if not halves:
        return None, f"{kind} turns neighbouring numbers of a key, which is not written here"
    if rope not in _CONSTANT:
        return None, f"the rotary frequencies of {kind} ({rope}) change with a text's length"
    if "llama_4_scaling_beta" in (getattr(config, "rope_parameters", None) or {}):
        return None, f"{kind} scales queries by their position"
    if made.inv_freq.dim() != 1:
        return None, f"{kind} has rotary frequencies for each kind of layer"
    return rotation(made.inv_freq), ""
