"""A prompt run through the model once: in a causal model its keys and values are the same beside every row."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from fastprefix.hf.model import dtensor as sharded
from fastprefix.prefixes.prefix import LayerKV
from fastprefix.validation import fail

if TYPE_CHECKING:
    from fastprefix.hf.adapters.installation import Installation
    from fastprefix.hf.runtime.prefix_reader import Reading

KeyValues = list[LayerKV | None]  # of every attention layer


class Nested:
    """The model's forward over prompts, inside a forward over rows."""

    def __init__(self, reading: Reading | None, outermost: bool) -> None:
        self.reading = reading  # what the prompts themselves have in front of them
        self.outermost = outermost  # whether the prompts run through the whole model, as a caller's rows do
        self.hidden: Tensor | None = None  # [N, P, d]


class Prompted(NamedTuple):
    """What the model made of N prompts."""

    key_values: list[KeyValues]  # of each prompt
    last: Tensor  # [N, d], hidden states of their last tokens: they predict what comes next
    output: Any  # of the module that was run


def run(
    state: Installation,
    prompts: Sequence[Tensor],
    reading: Reading | None = None,
    module: nn.Module | None = None,
    options: dict[str, Any] | None = None,
) -> Prompted:
    """Run prompts, embeddings ``[P_n, d]`` or token ids ``[P_n]``, side by side in one forward.

    Args:
        reading: what stands in front of them, if anything.
        module: the model or its part around all layers (default); ``options``: of its forward.
    """
    sharded.refuse_bank(p for module in state.layers.modules for p in module.parameters())
    lengths = [len(x) for x in prompts]
    # torch.vmap knows stack alone.
    padded = torch.stack(list(prompts)) if len(set(lengths)) == 1 else nn.utils.rnn.pad_sequence(list(prompts), True)
    inputs: dict[str, Any] = {"inputs_embeds" if padded.dim() == 3 else "input_ids": padded}
    if padded.dim() == 3:
        inputs["inputs_embeds"] = padded.to(state.model.get_input_embeddings().weight.dtype)
    if len(set(lengths)) > 1:
        columns = torch.arange(padded.shape[1], device=padded.device)
        inputs["attention_mask"] = (columns < torch.tensor(lengths, device=padded.device)[:, None]).long()
    if "use_cache" in state.layers.main.owner_arguments:
        inputs["use_cache"] = False
    runs: Any = state.layers.main.owner if module is None else module
    nested = Nested(reading, outermost=module is not None)
    # Reentrant checkpointing runs without gradients first: what is captured there would have none.
    checkpointing = state.checkpointing
    modules = [m for m in checkpointing.modules if m.gradient_checkpointing] if checkpointing.reentrant() else []
    # No context managers of generators here: torch.compile traces this.
    outside, state.nested = state.nested, nested
    _refuse_mixed_adapters(state.layers.main.owner)
    for slot in state.slots:
        slot.capturing = True
    for checkpointed in modules:
        checkpointed.gradient_checkpointing = False
    try:
        output = runs(**inputs, **(options or {}))
        captured = [slot.captured for slot in state.slots]
    finally:
        state.nested = outside
        for slot in state.slots:
            slot.capturing, slot.captured = False, None
        for checkpointed in modules:
            checkpointed.gradient_checkpointing = True
    assert nested.hidden is not None
    last = nested.hidden[torch.arange(len(lengths)), [n - 1 for n in lengths]]
    pairs: list[KeyValues] = [
        [None if kv is None else _one_dtype(kv[0][i, :, :n], kv[1][i, :, :n]) for kv in captured]
        for i, n in enumerate(lengths)
    ]
    return Prompted(pairs, last, output)


def _refuse_mixed_adapters(owner: nn.Module) -> None:
    """PEFT's LoRA chooses an adapter for each row by hooks: the prompts' rows are others."""
    for module in owner.modules():
        for hook in module._forward_pre_hooks.values():
            name = getattr(getattr(hook, "func", hook), "__name__", "")
            if name == "_adapter_names_pre_forward_hook":
                raise fail("adapter_names", "an adapter for each row beside a prompt", "one adapter for the batch")


def _one_dtype(k: Tensor, v: Tensor) -> LayerKV:
    """Under autocast rotary positions leave keys in fp32 beside values in bf16."""
    dtype = torch.promote_types(k.dtype, v.dtype)
    return LayerKV(k.to(dtype), v.to(dtype))


def check_tokens(model: Any) -> None:
    """Raise ValueError unless a model reads tokens, as prompts are."""
    if model.main_input_name != "input_ids":
        got = f"{type(model).__name__}, which reads {model.main_input_name}"
        raise fail("model", got, "a model of input_ids: prompts are tokens")
    if getattr(model.config, "is_encoder_decoder", False):
        expected = "a decoder or an encoder (an encoder-decoder: attach with a PrefixConfig, or load what PEFT saved)"
        raise fail("model", f"{type(model).__name__}, an encoder-decoder", expected)


def check(state: Installation) -> None:
    """Raise ValueError unless a prompt can stand in front of a model's rows."""
    check_tokens(state.model)
    check_images(state)
    if state.layers.again:
        got = f"{type(state.model).__name__}, whose layers share an attention module"
        raise fail("model", got, "one module a layer: a prompt has keys of its own in each")
    if state.layers.kinds:
        got = f"{type(state.model).__name__}, some of whose layers have no attention"
        raise fail("model", got, "attention in every layer: others would not see the prompt")
    if not state.layers.main.takes_positions:
        got = f"{type(state.model).__name__}, whose forward takes no position_ids"
        if state.layers.main.passes_positions_by:
            got = f"{type(state.model).__name__}, whose position_ids move nothing"
        raise fail("model", got, "one that does: rows are moved behind a prompt")


def check_images(state: Installation) -> None:
    """Raise ValueError for a model whose images stand at places of their own, which must not move with the text.

    HunYuan-VL counts an image's tokens by their column, their row and the image's number, from 0 wherever it stands in
    the text; its positions do not tell which tokens are an image's.
    """
    name = type(state.layers.main.owner).__name__
    if name.startswith("HunYuanVL"):
        got = f"{type(state.model).__name__}, whose images have absolute positions beside a text that is moved"
        raise fail("model", got, "a PrefixConfig with position_offset='none', which moves nothing")


def refuse_cache(kwargs: dict[str, Any], reason: str) -> None:
    """Raise ValueError for a cache: a prompt concatenated into it would be content ever after."""
    if kwargs.get("past_key_values") is not None:
        raise fail("past_key_values", f"a cache, where the prompt has to be concatenated ({reason})", "use_cache=False")


def say(state: Installation, reason: str) -> None:
    """Warn, once for each reason, that a prompt is concatenated."""
    if reason not in state.said:
        state.said.add(reason)
        warnings.warn(f"fastprefix: the prompt is concatenated to every row, not shared: {reason}", stacklevel=2)
