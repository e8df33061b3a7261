"""Runs prompts through the model once: in a causal model their keys and values are the same for every row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastprefix.errors import fail
from fastprefix.hf.model import dtensor
from fastprefix.hf.model.facts import ModelFacts
from fastprefix.hf.model.gradient_checkpointing import checkpointed_modules, is_reentrant
from fastprefix.hf.runtime.forward_context import ForwardContext, ForwardState, KeyValues, NestedForward
from fastprefix.hf.runtime.slots import AttentionSlots
from fastprefix.prefixes.prefix import LayerKV


class PrefillResult(NamedTuple):
    """The result of running N prompts through a model."""

    key_values: list[KeyValues]  # one for each prompt
    last: Tensor  # [N, d], hidden states of the prompts' last tokens, which predict the next token
    output: Any  # output of the module that was run


class PromptPrefill:
    """Runs prompts through one model and captures their keys and values."""

    def __init__(self, facts: ModelFacts, slots: AttentionSlots, forward: ForwardState) -> None:
        self.facts, self.slots, self.forward = facts, slots, forward
        self.checkpointed = checkpointed_modules(facts.model)

    def run(
        self,
        prompts: Sequence[Tensor],
        context: ForwardContext | None = None,
        module: nn.Module | None = None,
        options: dict[str, Any] | None = None,
    ) -> PrefillResult:
        """Run prompts as one batch in one forward, with their gradients.

        Args:
            prompts: embeddings ``[P_n, d]`` or token ids ``[P_n]``.
            context: the prefix that the prompts themselves read, if any.
            module: the module to run: the model, or (default) its part around all layers.
            options: further keyword arguments of that module's forward.
        """
        layers, slots = self.facts.layers, list(self.slots)
        dtensor.refuse_bank((p for layer in layers.modules for p in layer.parameters()), layers.shards)
        lengths = [len(x) for x in prompts]
        # torch.vmap supports stack, but not pad_sequence.
        same = len(set(lengths)) == 1
        padded = torch.stack(list(prompts)) if same else nn.utils.rnn.pad_sequence(list(prompts), True)
        inputs: dict[str, Any] = {"inputs_embeds" if padded.dim() == 3 else "input_ids": padded}
        if padded.dim() == 3:
            inputs["inputs_embeds"] = padded.to(self.facts.model.get_input_embeddings().weight.dtype)
        if not same:
            columns = torch.arange(padded.shape[1], device=padded.device)
            inputs["attention_mask"] = (columns < torch.tensor(lengths, device=padded.device)[:, None]).long()
        if "use_cache" in layers.main.owner_arguments:
            inputs["use_cache"] = False
        runs: Any = layers.main.owner if module is None else module
        nested = NestedForward(context, outermost=module is not None)
        # Reentrant checkpointing runs without gradients first, so keys and values captured there would have none.
        modules = [m for m in self.checkpointed if m.gradient_checkpointing] if is_reentrant(self.checkpointed) else []
        # No context managers made from generators here, as torch.compile traces this.
        outside, self.forward.nested = self.forward.nested, nested
        _refuse_mixed_adapters(layers.main.owner)
        for slot in slots:
            slot.capturing = True
        for checkpointed in modules:
            checkpointed.gradient_checkpointing = False
        try:
            output = runs(**inputs, **(options or {}))
            captured = [slot.captured for slot in slots]
        finally:
            self.forward.nested = outside
            for slot in slots:
                slot.capturing, slot.captured = False, None
            for checkpointed in modules:
                checkpointed.gradient_checkpointing = True
        assert nested.hidden is not None
        last = nested.hidden[torch.arange(len(lengths)), [n - 1 for n in lengths]]
        pairs: list[KeyValues] = [
            [None if kv is None else _one_dtype(kv[0][i, :, :n], kv[1][i, :, :n]) for kv in captured]
            for i, n in enumerate(lengths)
        ]
        return PrefillResult(pairs, last, output)


def _refuse_mixed_adapters(owner: nn.Module) -> None:
    """Raise ValueError where PEFT's hooks choose a LoRA adapter for each row: prompts are not the batch's rows."""
    for module in owner.modules():
        for hook in module._forward_pre_hooks.values():
            name = getattr(getattr(hook, "func", hook), "__name__", "")
            if name == "_adapter_names_pre_forward_hook":
                raise fail("adapter_names", "an adapter for each row beside a prompt", "one adapter for the batch")


def _one_dtype(k: Tensor, v: Tensor) -> LayerKV:
    """Bring keys and values to one dtype: under autocast, rotary positions leave keys in fp32 and values in bf16."""
    dtype = torch.promote_types(k.dtype, v.dtype)
    return LayerKV(k.to(dtype), v.to(dtype))


def refuse_cache(kwargs: dict[str, Any], reason: str) -> None:
    """Raise ValueError for a forward with a cache: a concatenated prompt would stay in the cache as content."""
    if kwargs.get("past_key_values") is not None:
        raise fail("past_key_values", f"a cache, where the prompt has to be concatenated ({reason})", "use_cache=False")
