"""``explain``: which backend runs and why, for a call of the operator or for a whole model."""

from __future__ import annotations

from typing import Any

from torch import nn

from fastprefix import functional


def explain(*args: Any, **kwargs: Any) -> str:
    """Explain a call of ``prefix_attention`` (its arguments), or a model with a prefix attached.

    Returns:
        For a call: one line for each backend - chosen, available, or why it is not. For a model: its prefixes, then for
        each attention layer what the active prefix adds there and which backend runs a short forward.

    Raises:
        ValueError: as ``prefix_attention``; or no prefix is attached to the model.
    """
    if args and isinstance(args[0], nn.Module):
        from fastprefix.hf.explain import explain_model

        return explain_model(*args, **kwargs)
    return functional.explain(*args, **kwargs)
