"""A tiny random Llama, a tokenizer of whole words beside it, and a few pairs for the two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

COLOURS = {"grass": "green", "snow": "white", "coal": "black", "sky": "blue", "blood": "red", "sun": "yellow"}
ROWS = [{"prompt": f"the colour of {thing} is", "completion": f" {colour}"} for thing, colour in COLOURS.items()]
SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")


def tiny_tokenizer() -> Any:
    """Whole words; pad 0, bos 1, eos 2; a bos in front of every text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = dict.fromkeys(word for row in ROWS for text in row.values() for word in text.split())
    vocab = {word: i for i, word in enumerate((*SPECIAL, *words))}
    raw = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    names = {f"{name[1:-1]}_token": name for name in SPECIAL}
    return PreTrainedTokenizerFast(tokenizer_object=raw, **names)


SIZES: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.15,
}


def tiny_model() -> Any:
    """Always the same numbers; the random state is left as it was."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **SIZES)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


def save_tiny(folder: Path) -> Path:
    """Both, as ``from_pretrained`` reads them."""
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def tiny_qwen3() -> Any:
    """A Qwen3, which norms the queries and keys of each head; always the same numbers."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(num_attention_heads=8, num_key_value_heads=4, head_dim=8, **SIZES)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Qwen3ForCausalLM(config).eval()
