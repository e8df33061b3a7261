"""``shared_prompt``: a system prompt or few-shot examples read by every row, computed once per forward."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastprefix.hf.adapters.lookup import found, install, uninstall
from fastprefix.hf.model import layers as probe
from fastprefix.hf.model import offload as offloaded
from fastprefix.hf.runtime import exactness
from fastprefix.hf.runtime import prefix_reader as reading
from fastprefix.hf.runtime import prompt_prefill as sharing
from fastprefix.hf.runtime.prefix_reader import Bank, Choice, Reading, batch_size
from fastprefix.prefixes.prefix import LayerKV
from fastprefix.validation import fail

if TYPE_CHECKING:
    from fastprefix.hf.adapters.installation import Installation


_numbers = itertools.count()


class SharedPrompt:
    """What :func:`shared_prompt` gives.

    Attributes:
        next_logits: ``[B, V]``, what the prompt predicts as each row's first token: from the last forward of a
            language model that started its rows (no cache, no ``logits_to_keep``); with its gradient.
    """

    def __init__(self, prompts: list[Tensor], groups: Tensor | None) -> None:
        self.prompts = prompts  # [P_n] token ids
        self.groups = groups  # [B]
        self.number = next(_numbers)  # its name in a cache's memo
        self.next_logits: Tensor | None = None

    def rows(self, batch: int) -> list[int]:
        """Each row's prompt."""
        if self.groups is None:
            return [0] * batch
        if batch % len(self.groups):
            raise fail("groups", f"{len(self.groups)} groups", f"one for each of the batch's {batch} rows")
        return self.groups.repeat_interleave(batch // len(self.groups)).tolist()

    def read(self, state: Installation, choice: Choice | None, kwargs: dict[str, Any]) -> Reading:
        """The prompts behind what the model itself has attached, if anything."""
        if choice is not None and len(choice.names) > 1:
            raise fail("names", "a mixed batch beside a shared prompt", "one prefix for all rows")
        rows = self.rows(batch_size(state, kwargs))
        used = sorted(set(rows))
        front = None if choice is None else state.read_choice(choice, kwargs)
        offset = 0 if front is None else front.offset
        assert isinstance(offset, int)
        if front is not None and front.concatenated is not None:
            raise fail("model", "a soft prompt that has to be concatenated", "one that can be shared, or none")
        longest = max(len(self.prompts[n]) for n in used)
        reason = exactness.inexact(state, longest + offset, kwargs, embedded=False)
        if reason is not None:
            return self.concatenate(state, rows, front, kwargs, reason)
        key = (tuple(used), choice)
        bank = state.memo.recall(kwargs, ("shared", self.number), key)
        if not isinstance(bank, Bank):
            made = sharing.run(state, [self.prompts[n] for n in used], front)
            behind = [_in_front(state, front, i) for i in range(len(state.slots))]
            layers = [reading.pack([_join(own, kv[i]) for kv in made.key_values]) for i, own in enumerate(behind)]
            bank = Bank(list(used), [offset + len(self.prompts[n]) for n in used], layers, list(made.last))
            state.memo.remember(kwargs, ("shared", self.number), key, bank)
        return reading.choose(state, bank, Choice(tuple(rows)), kwargs)

    def concatenate(
        self, state: Installation, rows: list[int], front: Reading | None, kwargs: dict[str, Any], reason: str
    ) -> Reading:
        """The prompts in every row, padded on the left."""
        sharing.refuse_cache(kwargs, reason)
        sharing.say(state, reason)
        longest = max(len(prompt) for prompt in self.prompts)
        offset = 0 if front is None else front.offset
        lengths = torch.tensor([[len(self.prompts[n])] for n in rows])
        ragged = len({len(prompt) for prompt in self.prompts}) > 1
        result = Reading(lengths + offset, [None] * len(state.slots) if front is None else front.layers)
        ids = torch.stack([nn.functional.pad(self.prompts[n], (longest - len(self.prompts[n]), 0)) for n in rows])
        result.concatenated_ids = ids
        result.concatenated = state.model.get_input_embeddings()(ids)
        assert isinstance(offset, int)
        result.concatenated_from = offset
        if ragged:
            result.concatenated_mask = (torch.arange(longest) >= longest - lengths).long().to(ids.device)
        return result


def _in_front(state: Installation, front: Reading | None, layer: int) -> LayerKV | None:
    """What a layer reads in front of the prompts."""
    if front is None:
        return None
    kv: LayerKV | None = state.slots[layer]() if front.layers is None else front.layers[layer]
    return kv


def _join(first: LayerKV | None, kv: LayerKV | None) -> LayerKV | None:
    """One prefix behind the other."""
    if first is None or kv is None:
        return kv if first is None else first
    return LayerKV(torch.cat([first.k, kv.k], 1), torch.cat([first.v, kv.v], 1))


@contextmanager
def shared_prompt(model: Any, input_ids: Any, groups: Any = None) -> Iterator[SharedPrompt]:
    """Let all rows inside the block share a prompt - a system prompt, few-shot examples - that is computed once.

    Every forward of a causal model inside the block behaves as if its row's prompt stood in front of the row: the
    prompt runs through the model once, beside the batch, and its keys and values are read by every row. Gradients
    flow into whatever is trainable in the model (LoRA, all of it) through rows and prompt alike. Logits and labels
    are those of the rows' own tokens; with ``labels``, a row's first token counts in the loss, as the prompt predicts
    it; they are a view (``reshape`` them). Generation computes the prompt once for its cache. A prefix that is attached
    stands in front of the prompt.

    Where sharing would not be exact (bidirectional models, active dropout, rows that outgrow a sliding window) the
    prompt is repeated in every row, with a warning that says so; with a cache that raises and asks for
    ``use_cache=False``.

    Args:
        model: a transformers model that can carry a prefix, or a PeftModel around one (LoRA; patched ones).
            Nothing is frozen. Slots stay in the model after the block, idle; :func:`detach` takes them out.
        input_ids: ``[P]`` token ids; or N prompts, ``[N, P]`` or sequences of different lengths.
        groups: ``[B]`` ints, each row's prompt; needed when there are several (GRPO: one prompt, many completions).

    Yields:
        A :class:`SharedPrompt`, whose ``next_logits`` are what the prompt predicts as each row's first token.

    Raises:
        ValueError: an argument does not fit, or the model cannot carry a prefix.
    """
    bare = _bare(model)
    probe.check_model(bare)
    sharing.check_tokens(bare)
    prompts = prompts_of(input_ids, offloaded.device(bare.get_input_embeddings()))
    chosen = None if groups is None else torch.as_tensor(groups).reshape(-1).cpu()
    if chosen is None and len(prompts) > 1:
        raise fail("groups", "None", f"the prompt of each row, as there are {len(prompts)} prompts")
    if chosen is not None and (chosen.is_floating_point() or not len(chosen)):
        raise fail("groups", repr(groups), "[B] ints")
    if chosen is not None and not 0 <= int(chosen.min()) <= int(chosen.max()) < len(prompts):
        raise fail("groups", f"{int(chosen.min())}..{int(chosen.max())}", f"0..{len(prompts) - 1}")
    fresh = found(bare) is None
    state = found(bare) or install(bare)
    try:
        sharing.check(state)
    except ValueError:
        if fresh:
            uninstall(state)
        raise
    if state.shared is not None or state.chosen is not None:
        raise fail("input_ids", "a shared prompt inside another block", "one block of shared_prompt or prefix_batch")
    if state.source.beside:
        raise fail("model", "one with gated prompts (ADAPTION_PROMPT)", "one without: they are read beside the content")
    with state.turns.block():
        on = state.configs.on
        state.shared = SharedPrompt(prompts, chosen)
        try:
            state.switch(on=True)
            yield state.shared
        finally:
            state.shared = None
            state.switch(on=on)


def _bare(model: Any) -> Any:
    """The transformers model inside a PeftModel, or the model."""
    config = getattr(model, "active_peft_config", None) if hasattr(model, "get_base_model") else None
    if config is None:
        return model
    bare = model.get_base_model()
    if config.is_prompt_learning and found(bare) is None:
        raise fail("model", f"a PeftModel with {config.peft_type.value}", "one that fastprefix.patch was called on")
    return bare


def prompts_of(input_ids: Any, device: torch.device) -> list[Tensor]:
    """Token ids ``[P]``, ``[N, P]``, or N sequences of different lengths, as N tensors."""
    if isinstance(input_ids, Tensor):
        if input_ids.dim() not in (1, 2) or input_ids.is_floating_point() or 0 in input_ids.shape:
            got = f"shape {list(input_ids.shape)}, {input_ids.dtype}"
            raise fail("input_ids", got, "token ids [P] or [N, P], at least one token")
        rows = list(input_ids.reshape(-1, input_ids.shape[-1]))
    elif isinstance(input_ids, Sequence) and input_ids and not isinstance(input_ids, str):
        nested = [input_ids] if isinstance(input_ids[0], int) else input_ids
        rows = [torch.as_tensor(row, dtype=torch.long) for row in nested]
    else:
        raise fail("input_ids", type(input_ids).__name__, "a tensor of token ids, or sequences of them")
    if any(row.dim() != 1 or len(row) == 0 for row in rows):
        raise fail("input_ids", "an empty or nested sequence", "at least one token id in each prompt")
    return [row.to(device) for row in rows]
