"""What is attached to a model, layer by layer."""

from __future__ import annotations

from typing import Any

from fastprefix import functional
from fastprefix.hf import probe
from fastprefix.hf.install import installation


def explain_model(model: Any) -> str:
    """A line a prefix, then each attention layer: shape, prefix, the backend of a 2-token forward and why."""
    import torch

    state = installation(model)
    lines = []
    for name, prefix in state.prefixes.items():
        count = sum(p.numel() for p in prefix.parameters() if p.requires_grad)
        how = "MLP" if prefix.encoder is not None else "keys and values"
        mark = "active" if name == state.active else "attached"
        where = f"{len(prefix.layer_indices)} of {len(state.layers.modules)} layers"
        lines.append(f"prefix {name!r}: {mark}, P={prefix.num_virtual_tokens}, {where}, {count:,} trainable ({how})")
    if state.active is None:
        return "\n".join([*lines, "no prefix is active: the model runs its own attention"])
    names = {id(module): name for name, module in model.named_modules()}
    state.hooks.paused = True  # positions do not matter here, and a look must not change what the hooks know
    try:
        calls = probe.run_tokens(model, torch.zeros(1, 2, dtype=torch.long))
    finally:
        state.hooks.paused = False
    for index, call in enumerate(calls):
        tokens = call.tensors["prefix_k"].shape[-2]
        shape = state.layers.shapes[index]
        heads = f"H={call.tensors['q'].shape[1]} H_kv={shape.num_kv_heads} D={shape.head_dim}"
        heads += f" D_v={shape.value_dim}" if shape.value_dim != shape.head_dim else ""
        lines.append(f"{index:3d} {names[id(call.module)]}: {heads} P={tokens}")
        lines += [f"      {line}" for line in functional.explain(**call.tensors, **call.options).splitlines()]
    return "\n".join(lines)
