"""Tiny encoder-decoders, and what their tests share: inputs, names of layers, positions moved by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastprefix
from fastprefix import PrefixConfig
from fastprefix.hf.adapters.lookup import require_installation
from fastprefix.prefixes.prefix import Prefix
from tests.model_zoo.architectures import VOCAB, Row

_BART = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
_T5 = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 3,  # transformers' generate makes the decoder's cache with as many layers as the encoder has
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
_WHISPER = {
    "num_mel_bins": 8,
    "max_source_positions": 6,
    "max_target_positions": 64,
    "suppress_tokens": [],
    "begin_suppress_tokens": [],
}
_BIAS = "relative positions, on the content only"
_GEMMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "sliding_window": 4,
    "attn_logit_softcapping": 5.0,
    "pad_token_id": 0,
}


def _row(title: str, family: str, options: dict[str, Any], notes: str) -> Row:
    return Row(title, family + "ForConditionalGeneration", family + "Config", options, notes)


ROWS: dict[str, Row] = {
    "bart": _row("BART", "Bart", _BART, "learned positions"),
    "mbart": _row("mBART", "MBart", _BART, "learned positions"),
    "pegasus": _row("Pegasus", "Pegasus", _BART, "sinusoidal positions"),
    "m2m_100": _row("M2M100", "M2M100", _BART, "sinusoidal positions that skip padding"),
    "t5": _row("T5", "T5", _T5, _BIAS),
    "mt5": _row("mT5", "MT5", {**_T5, "feed_forward_proj": "gated-gelu"}, _BIAS),
    "umt5": _row("UMT5", "UMT5", _T5, _BIAS + ", in every layer"),
    "marian": Row(
        "Marian", "MarianMTModel", "MarianConfig", {**_BART, "decoder_vocab_size": VOCAB}, "sinusoidal positions"
    ),
    "whisper": _row("Whisper", "Whisper", {**_BART, **_WHISPER}, "reads mel spectrograms"),
}

# Their kin, which have all parts at once.
KIN: dict[str, Row] = {
    "blenderbot": _row("Blenderbot", "Blenderbot", _BART, "learned positions"),
    "plbart": _row("PLBart", "PLBart", _BART, "learned positions"),
    "switch": _row(
        "Switch Transformers", "SwitchTransformers",
        {**_T5, "num_decoder_layers": 3, "num_experts": 2, "expert_capacity": 64, "router_jitter_noise": 0.0,
         "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
        _BIAS + ", experts",
    ),
    "t5gemma": Row(
        "T5Gemma", "T5GemmaForConditionalGeneration", "T5GemmaConfig",
        {"encoder": _GEMMA, "decoder": _GEMMA, "vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1,
         "eos_token_id": 2, "decoder_start_token_id": 1},
        "rotary positions, GQA, softcap, sliding window; no static cache",
    ),
}  # fmt: skip

ALL = {**ROWS, **KIN}
# Those whose adapters of PEFT's are loaded in a test.
LOADED = ("bart", "mbart", "pegasus", "m2m_100", "marian", "t5", "mt5")
P, S, T = 5, 6, 9


def batch(name: str, padded: bool = False) -> dict[str, Tensor]:
    """Three sources and targets ``[3, T]``, ``[3, S]``; sources padded on the right, targets on either side."""
    torch.manual_seed(1)
    targets = torch.randint(3, VOCAB, (3, S))
    if name == "whisper":
        found: dict[str, Tensor] = {"input_features": torch.randn(3, 8, 12), "decoder_input_ids": targets}
    else:
        found = {"input_ids": torch.randint(3, VOCAB, (3, T)), "decoder_input_ids": targets}
    if padded:
        mask = torch.ones(3, S, dtype=torch.long)
        mask[1, :2] = mask[2, 4:] = 0
        found["decoder_attention_mask"] = mask
        found["decoder_input_ids"] = targets.masked_fill(mask == 0, 0)
        if name != "whisper":
            mask = torch.ones(3, T, dtype=torch.long)
            mask[0, 5:] = 0
            found["attention_mask"] = mask
            found["input_ids"] = found["input_ids"].masked_fill(mask == 0, 0)
    return found


def cast(inputs: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Features in a model's dtype."""
    return {k: x.to(dtype) if x.is_floating_point() else x for k, x in inputs.items()}


def key_values(model: Any, prefix: Prefix, leaves: bool = False) -> dict[str, tuple[Tensor, Tensor]]:
    """The prefix's keys and values by the attention module's name; ``leaves``: copies that take gradients."""
    names = {id(m): n for n, m in model.named_modules()}
    modules = [require_installation(model).facts.layers.modules[i] for i in prefix.layer_indices]
    pairs = prefix.key_values()
    if leaves:
        pairs = [(k.detach().clone().requires_grad_(), v.detach().clone().requires_grad_()) for k, v in pairs]
    return {names[id(m)]: kv for m, kv in zip(modules, pairs, strict=True)}


def move_positions(model: Any, by: int) -> None:
    """Shift the decoder's table of positions itself, so that place i has what place i + ``by`` had."""
    table = getattr(model.get_decoder(), "embed_positions", None)
    if table is None:
        return
    # Row 0 of M2M100's is padding's.
    if isinstance(table, nn.Embedding):
        with torch.no_grad():
            table.weight[:-by] = table.weight[by:].clone()
    else:
        first = table.padding_idx + 1
        table.weights[first:-by] = table.weights[first + by :].clone()


def attached(name: str, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[Any, Prefix]:
    """A model with a random prefix in the model's dtype."""
    model = ALL[name].build(dtype)
    decoder = model.get_decoder()
    if name == "umt5" and not getattr(decoder.block[0].layer[0].SelfAttention, "is_causal", True):
        pytest.skip("this transformers' own UMT5 sees the future under SDPA")
    prefix = fastprefix.attach(model, PrefixConfig(P, init=fastprefix.init.normal(0.6), **options))
    return model, prefix.to(dtype)


def source(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """What ``generate`` is given."""
    return {k: x for k, x in inputs.items() if not k.startswith("decoder")}


def count_hooks(model: Any) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
