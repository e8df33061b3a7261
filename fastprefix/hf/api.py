"""The public functions that need transformers. Importing this module registers the attention implementation."""

from fastprefix.hf.adapters.attach import attach, bake, detach, set_prefix
from fastprefix.hf.adapters.ensemble import ensemble
from fastprefix.hf.adapters.nearest_tokens import nearest_tokens
from fastprefix.hf.adapters.prefix_batch import prefix_batch
from fastprefix.hf.attention import registration as _register  # noqa: F401
from fastprefix.hf.peft.patch import patch, unpatch
from fastprefix.hf.sharing.completions import completion_logprobs
from fastprefix.hf.sharing.hard_prompt_search import search_hard_prompt
from fastprefix.hf.sharing.shared_prompt import shared_prompt
from fastprefix.hf.sharing.trl import share_prompts
from fastprefix.hf.storage.registry import register
from fastprefix.hf.storage.save_load import load, save
from fastprefix.hf.storage.whole_model import from_pretrained, save_pretrained

__all__ = [
    "attach",
    "bake",
    "completion_logprobs",
    "detach",
    "ensemble",
    "from_pretrained",
    "load",
    "nearest_tokens",
    "patch",
    "prefix_batch",
    "register",
    "save",
    "save_pretrained",
    "search_hard_prompt",
    "set_prefix",
    "share_prompts",
    "shared_prompt",
    "unpatch",
]
