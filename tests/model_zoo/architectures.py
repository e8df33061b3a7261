"""Tiny random models of every architecture that is claimed to work: one table for the tests and the README."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import transformers

from tests.model_zoo import decoders, encoders, experts, hybrids, vision_audio
from tests.model_zoo.row import VOCAB, Row

ROWS: dict[str, Row] = {**decoders.ROWS, **experts.ROWS, **hybrids.ROWS, **encoders.ROWS, **vision_audio.ROWS}

REFUSED: dict[str, Callable[[], Any]] = {
    "bloom": lambda: transformers.BloomForCausalLM(
        transformers.BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4)
    ),
    "falcon (ALiBi)": lambda: transformers.FalconForCausalLM(
        transformers.FalconConfig(
            vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=True
        )
    ),
    "mpt": lambda: transformers.MptForCausalLM(
        transformers.MptConfig(vocab_size=VOCAB, d_model=32, n_layers=2, n_heads=4)
    ),
    "deberta_v2": lambda: transformers.DebertaV2Model(
        transformers.DebertaV2Config(
            vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
        )
    ),
}

# One architecture of every kind of code that is between a prefix and its attention. Other rows are their kin.
KINDS: dict[str, str] = {
    "llama_gqa": "decoder with rotary positions, fewer key/value heads",
    "qwen2_vl": "decoder without a head, rotary positions in three sections",
    "ministral3": "queries scaled by their position",
    "smollm3": "layers without positions",
    "gpt2": "learned positions, dropout of attention",
    "opt": "learned positions that the mask counts",
    "mistral_window": "sliding window",
    "llama4": "attention in chunks",
    "gemma2": "softcap, windows in some layers",
    "gemma4": "layers that share keys and values, head dims that differ",
    "gptj": "one method overridden",
    "gpt_neo": "the same, local layers",
    "falcon": "the same, query groups",
    "gpt_oss": "attention sinks, experts",
    "deepseek_v3": "keys and values of different widths",
    "qwen3_next": "linear attention between",
    "jamba": "states between",
    "bamba": "states in chunks between",
    "zamba2": "one module that runs as several layers",
    "lfm2": "convolutions between",
    "falcon_h1": "a state beside each attention",
    "recurrent_gemma": "recurrences between, windows",
    "bert": "encoder",
    "roberta": "encoder, positions counted behind a padding id",
    "modernbert": "encoder with windows",
    "albert": "encoder, one module that runs as every layer",
    "distilbert": "encoder without a cache's argument",
    "clip_text": "causal encoder",
    "vit": "images",
    "wav2vec2": "sounds, a mask of frames",
}


def one_of_each_kind(names: Iterable[str], kinds: Iterable[str] = KINDS) -> list[Any]:
    """Parameters of a test that takes minutes over all names: those of other than ``kinds`` are marked exhaustive."""
    kinds = set(kinds)
    return [pytest.param(name, marks=() if name in kinds else pytest.mark.exhaustive) for name in names]
