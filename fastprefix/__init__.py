"""fastprefix: prefix tuning and its family at the cost of the frozen model. See README.md."""

from typing import TYPE_CHECKING, Any

from fastprefix import init
from fastprefix.explain import explain
from fastprefix.functional import prefix_attention
from fastprefix.prefixes.config import PrefixConfig
from fastprefix.prefixes.llama_adapter import LlamaAdapterConfig
from fastprefix.prefixes.memory import PrefixMemoryConfig
from fastprefix.prefixes.prompt import PromptConfig
from fastprefix.verification.run import verify

if TYPE_CHECKING:
    from fastprefix.cartridges import CartridgeConfig, attention_matching, train_cartridge
    from fastprefix.hf.api import (
        attach,
        bake,
        completion_logprobs,
        detach,
        ensemble,
        from_pretrained,
        load,
        nearest_tokens,
        patch,
        prefix_batch,
        register,
        save,
        save_pretrained,
        search_hard_prompt,
        set_prefix,
        share_prompts,
        shared_prompt,
        unpatch,
    )

__version__ = "0.1.0"
__all__ = [
    "CartridgeConfig",
    "LlamaAdapterConfig",
    "PrefixConfig",
    "PrefixMemoryConfig",
    "PromptConfig",
    "__version__",
    "attach",
    "attention_matching",
    "bake",
    "completion_logprobs",
    "detach",
    "ensemble",
    "explain",
    "from_pretrained",
    "init",
    "load",
    "nearest_tokens",
    "patch",
    "prefix_attention",
    "prefix_batch",
    "register",
    "save",
    "save_pretrained",
    "search_hard_prompt",
    "set_prefix",
    "share_prompts",
    "shared_prompt",
    "train_cartridge",
    "unpatch",
    "verify",
]
_CARTRIDGES = ("CartridgeConfig", "attention_matching", "train_cartridge")


def __getattr__(name: str) -> Any:
    # transformers takes seconds to import and is needed for none of the above.
    if name in _CARTRIDGES:
        from fastprefix import cartridges

        return getattr(cartridges, name)
    if name in __all__:
        from fastprefix.hf import api

        return getattr(api, name)
    raise AttributeError(f"module 'fastprefix' has no attribute {name!r}")
