"""What is attached to a model, layer by layer."""

from __future__ import annotations

from typing import Any

from fastprefix import functional
from fastprefix.hf import probe, sharing, wrappers
from fastprefix.hf.attention import AttentionCall
from fastprefix.hf.installation import Installation
from fastprefix.hf.reading import Entry
from fastprefix.hf.state import installation


def explain_model(model: Any) -> str:
    """A line a prefix, then each attention layer: shape, prefix, the backend of a 2-token forward and why."""
    state = installation(model)
    choice = state.choice()
    active = [] if choice is None else choice.distinct()
    lines = []
    for name in state.source.resident():
        entry = state.source.entry(name)
        count = sum(p.numel() for p in entry.parameters if p.requires_grad)
        mark = "active" if name in active else "attached"
        lines.append(f"{entry.kind} {name!r}: {mark}, P={entry.tokens}, {_where(state, entry)}, {count:,} trainable")
        if entry.prompt is not None:
            reason = sharing.inexact(state, entry.tokens, {})
            lines.append(f"      {'computed once per forward' if reason is None else f'concatenated: {reason}'}")
    if not active:
        return "\n".join([*lines, "no prefix is active: the model runs its own attention"])
    if state.layers.kinds:
        others = [kind for kind in dict.fromkeys(state.layers.kinds) if kind in probe.WITHOUT_ATTENTION]
        what = f"other layers have no keys to put a prefix before: {', '.join(others)}"
        lines.append(f"a hybrid, whose {what if others else 'layers keep a state beside their keys'}")
    names = {id(module): name for name, module in wrappers.unwrapped(model).named_modules()}
    # What the checks know must not change by a look.
    checked = [hooks.checked for hooks in state.hooks]
    for hooks in state.hooks:
        hooks.checked = True
    try:
        calls = [call for stack in state.layers.stacks for call in _rows(stack)]
    except ValueError as error:  # a forward that needs more than tokens: PEFT's multitask prompts
        return "\n".join([*lines, f"a forward of two tokens says: {error}"])
    finally:
        for hooks, before in zip(state.hooks, checked, strict=True):
            hooks.checked = before
    for index, call in enumerate(calls):
        tokens = call.tensors["prefix_k"].shape[-2]
        shape = state.layers.shapes[index]
        heads = f"H={call.tensors['q'].shape[1]} H_kv={shape.num_kv_heads} D={shape.head_dim}"
        heads += f" D_v={shape.value_dim}" if shape.value_dim != shape.head_dim else ""
        lines.append(f"{index:3d} {names.get(id(call.module), '?')}: {heads} P={tokens}")
        lines += [f"      {line}" for line in functional.explain(**call.tensors, **call.options).splitlines()]
    return "\n".join(lines)


def _rows(stack: probe.Stack) -> list[AttentionCall]:
    """A stack's layers in a forward of two tokens; a soft prompt's own calls come before them."""
    backwards = probe.run(stack.owner, stack.example())[::-1]
    return probe.once(backwards)[: len(stack.layers)][::-1]


def _where(state: Installation, entry: Entry) -> str:
    return "input embeddings" if entry.layers is None else f"{entry.layers} of {len(state.slots)} layers"
