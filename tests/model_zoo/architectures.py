"""Tiny random models of every architecture that is claimed to work: one table for the tests and the README."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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
