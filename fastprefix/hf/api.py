"""The public functions that need transformers; importing this registers the attention implementation."""

from fastprefix.hf import register as _register  # noqa: F401
from fastprefix.hf.batch import prefix_batch
from fastprefix.hf.install import attach, bake, detach, set_prefix
from fastprefix.hf.peft.patch import patch, unpatch
from fastprefix.hf.shared import shared_prompt
from fastprefix.hf.shelf import register
from fastprefix.hf.storage import load, save

__all__ = [
    "attach",
    "bake",
    "detach",
    "load",
    "patch",
    "prefix_batch",
    "register",
    "save",
    "set_prefix",
    "shared_prompt",
    "unpatch",
]
