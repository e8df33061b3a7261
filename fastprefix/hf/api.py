"""The public functions that need transformers; importing this registers the attention implementation."""

from fastprefix.hf import register as _register  # noqa: F401
from fastprefix.hf.install import attach, bake, detach, set_prefix
from fastprefix.hf.storage import load, save

__all__ = ["attach", "bake", "detach", "load", "save", "set_prefix"]
