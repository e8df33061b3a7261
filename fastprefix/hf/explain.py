"""``explain`` for models: describes, layer by layer, the prefixes that are attached to a model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel

from fastprefix import functional
from fastprefix.errors import fail
from fastprefix.hf.adapters.installation import Installation
from fastprefix.hf.adapters.lookup import find_installation, require_installation
from fastprefix.hf.adapters.verify_calls import attention_calls
from fastprefix.hf.api import attach, detach
from fastprefix.hf.attention.recording import AttentionCall
from fastprefix.hf.model import layers as model_layers
from fastprefix.hf.model import wrappers
from fastprefix.hf.runtime.exactness import why_not_shareable
from fastprefix.hf.runtime.forward_context import ResolvedPrefix
from fastprefix.prefixes.config import PrefixConfig
from fastprefix.verification import first_use


def explain_model(model: Any) -> str:
    """One line for each prefix, then for each attention layer its shape, prefix, and a 2-token forward's backends.

    Layers whose names differ only in numbers, with the same description, are listed together.
    """
    if find_installation(model) is None:
        check_carries(model)
    installation = require_installation(model)
    selected = installation.selection.current()
    active = [] if selected is None else selected.distinct()
    lines = []
    for name in installation.selection.provider.resident():
        entry = installation.selection.provider.resolve(name)
        count = sum(p.numel() for p in entry.parameters() if p.requires_grad)
        mark = "active" if name in active else "attached"
        where = _where(installation, entry)
        lines.append(f"{entry.kind} {name!r}: {mark}, P={entry.tokens}, {where}, {count:,} trainable")
        if entry.prompt is not None:
            lines.append(f"      {_how(installation, entry)}")
    if not active:
        return "\n".join([*lines, "no prefix is active: the model runs its own attention"])
    if types := installation.facts.layers.hybrid_layer_types:
        others = [kind for kind in dict.fromkeys(types) if kind in model_layers.WITHOUT_ATTENTION]
        what = f"other layers have no keys to put a prefix before: {', '.join(others)}"
        lines.append(f"a hybrid, whose {what if others else 'layers keep a state beside their keys'}")
    names = {id(module): name for name, module in wrappers.unwrapped(model).named_modules()}
    try:
        calls = attention_calls(installation)
    except ValueError as error:  # a forward that needs more than tokens: PEFT's multitask prompts
        return "\n".join([*lines, f"a forward of two tokens says: {error}"])
    groups: dict[tuple[str, ...], list[int]] = {}
    called = [names.get(id(call.module), "?") for call in calls]
    for index, call in enumerate(calls):
        pattern = re.sub(r"\d+", "N", called[index])
        groups.setdefault((pattern, *_about(installation, index, call)), []).append(index)
    for (_, about, *backends), members in groups.items():
        first, last = called[members[0]], called[members[-1]]
        span = first if len(members) == 1 else f"{first} to {last}"
        lines.append(f"{'layer' if len(members) == 1 else 'layers'} {_ranges(members)}, {span}: {about}")
        lines += [f"      {line}" for line in backends]
    return "\n".join(lines)


def check_carries(model: Any) -> None:
    """Raise ValueError with the reason where a bare model cannot carry a prefix; the model is left as it was."""
    try:
        with first_use.held(quiet=True):
            attach(model, PrefixConfig(1))
    except ValueError as error:
        names = [type(module).__name__.lower() for module in model.modules()]
        if isinstance(model, PreTrainedModel) and not any("attention" in name or "attn" in name for name in names):
            got = f"{type(model).__name__}, which has no attention layers"
            raise fail("model", got, "a model with some: a prefix is keys and values") from error
        raise
    detach(model)


def _about(installation: Installation, index: int, call: AttentionCall) -> list[str]:
    """A layer's shape and prefix length, then each backend's line of ``functional.explain``."""
    shape = installation.facts.layers.shapes[index]
    heads = f"H={call.tensors['q'].shape[1]} H_kv={shape.num_kv_heads} D={shape.head_dim}"
    heads += f" D_v={shape.value_dim}" if shape.value_dim != shape.head_dim else ""
    window = getattr(call.module, "sliding_window", None)  # read here, as two tokens fit any window
    heads += f" window={window}" if isinstance(window, int) else ""
    heads += f" P={call.tensors['prefix_k'].shape[-2]}"
    return [heads, *functional.explain(**call.tensors, **call.options).splitlines()]


def _ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers as text, with consecutive ones as a range: ``0-3, 5``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1] = [runs[-1][0], number]
        else:
            runs.append([number])
    return ", ".join("-".join(map(str, run)) for run in runs)


def _how(installation: Installation, entry: ResolvedPrefix) -> str:
    """How a soft prompt runs."""
    if entry.place != "before":
        at = "after the given text" if entry.place == "after" else f"at the marker {entry.place}"
        return f"{at}: runs with every row"
    reason = why_not_shareable(installation.facts, entry.tokens, {})
    return "computed once per forward" if reason is None else f"concatenated: {reason}"


def _where(installation: Installation, entry: ResolvedPrefix) -> str:
    return "input embeddings" if entry.layers is None else f"{entry.layers} of {len(installation.slots)} layers"
