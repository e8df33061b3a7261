"""What a row of the tables of models is, and the sizes that the tiny models share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers

VOCAB = 99
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
COMMON = {
    **SIZES,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GQA = {**COMMON, "num_key_value_heads": 2}
# Of GPT-2 and its kin, which have names of their own.
GPT = {
    "vocab_size": VOCAB,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    **{key: COMMON[key] for key in ("pad_token_id", "bos_token_id", "eos_token_id")},
}
MIXED = ["sliding_attention", "full_attention"]
# Why PEFT's prefix tuning does not compute the same.
SLIDING = "prefix is out of sight of a sliding window"
NO_CACHE = "prefix needs past_key_values, which it does not take"
STATES = "prefix tuning makes a cache that holds no states"
TWO_DIMS = "prefix has one head dim for keys and values"
NO_TOKENS = "prefix tuning is of token ids"


@dataclass(frozen=True)
class Row:
    """One architecture: how to build it, and whether PEFT computes the same (``peft`` None) or why not."""

    title: str
    cls: str
    config: str
    options: dict[str, Any]
    notes: str = ""
    peft: str | None = None
    content: str = "text"  # or image, sound, spectrogram
    positions_behind: int | None = None  # RoBERTa's: real tokens count from behind its padding id
    decoder: bool = False  # a causal stack without a head: it does not generate
    modes: tuple[bool, ...] = (True, False)  # of checkpointing: use_reentrant
    cached: bool = False  # past the attention interface: the oracle is a cache that begins with the prefix

    @property
    def generates(self) -> bool:
        """Whether it has a head that predicts tokens."""
        return self.cls.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "MTModel"))

    @property
    def causal(self) -> bool:
        """Whether content sees what is before it alone."""
        return self.generates or self.decoder

    @property
    def paddings(self) -> tuple[str, ...]:
        """How a batch of it can be padded; a sound's mask becomes one of frames, which count from the left."""
        found = {"image": ("none",), "spectrogram": ("none",), "sound": ("none", "right")}
        return found.get(self.content, ("none", "left", "right"))

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
        if dtype == torch.float64 and model._can_set_experts_implementation():
            model.set_experts_implementation("eager")  # the grouped matmul has no fp64
        return model.to(dtype).eval()


def row(title: str, family: str, head: str, options: dict[str, Any], config: str | None = None, **kw: Any) -> Row:
    """The row of ``<family><head>`` with its config's options."""
    return Row(title, family + head, config or family + "Config", options, **kw)


def lm(title: str, family: str, options: dict[str, Any], config: str | None = None, **kw: Any) -> Row:
    """A causal language model's."""
    return row(title, family, "ForCausalLM", options, config, **kw)
