"""The namespace of torch in which this package's operators are registered.

A build for Hugging Face's Kernel Hub brings a module of this name, with the same two names in it and a namespace of its
own, so that several builds, and the installed package, can be loaded in one process.
"""

from __future__ import annotations

import torch

ops = torch.ops.fastprefix


def add_op_namespace_prefix(op_name: str) -> str:
    """An operator's name with its namespace, as ``torch.library`` takes it."""
    return f"fastprefix::{op_name}"
