"""``shared_prompt``: a system prompt or few-shot examples that every row reads, computed once per forward."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastprefix.errors import fail
from fastprefix.hf.adapters.lookup import find_installation, install, uninstall
from fastprefix.hf.model import offload, probing
from fastprefix.hf.model.prompt_support import check_prompts, check_tokens
from fastprefix.hf.runtime.exactness import why_not_shareable
from fastprefix.hf.runtime.forward_context import AdapterSelection, ForwardContext, KeyValues, PrefixBank
from fastprefix.hf.runtime.prefix_reader import PrefixReader, pack
from fastprefix.hf.runtime.prompt_prefill import refuse_cache
from fastprefix.hf.runtime.slots import AttentionSlots
from fastprefix.prefixes.prefix import LayerKV

_numbers = itertools.count()


class SharedPrompt:
    """The object that :func:`shared_prompt` yields.

    Attributes:
        next_logits: ``[B, V]``, the prompt's prediction of each row's first token, with its gradient. From the last
            forward of a language model that started its rows (no cache, no ``logits_to_keep``).
    """

    def __init__(self, prompts: list[Tensor], groups: Tensor | None) -> None:
        self.prompts = prompts  # [P_n] token ids
        self.groups = groups  # [B]
        self.number = next(_numbers)  # identifies this prompt in a generation's cache
        self.next_logits: Tensor | None = None

    def rows(self, batch: int) -> list[int]:
        """The index of each row's prompt."""
        if self.groups is None:
            return [0] * batch
        if batch % len(self.groups):
            raise fail("groups", f"{len(self.groups)} groups", f"one for each of the batch's {batch} rows")
        return self.groups.repeat_interleave(batch // len(self.groups)).tolist()


class _PromptBlock:
    """An open block, which reads a :class:`SharedPrompt`; the user's object outlives it and holds no model."""

    def __init__(self, shared: SharedPrompt, reader: PrefixReader, slots: AttentionSlots) -> None:
        self.shared, self.prompts, self.number = shared, shared.prompts, shared.number
        self.reader, self.slots = reader, slots

    def predict(self, next_logits: Tensor) -> None:
        """Keep ``[B, V]``, the prompt's prediction of each row's first token."""
        self.shared.next_logits = next_logits

    def read(self, selection: AdapterSelection | None, kwargs: dict[str, Any]) -> ForwardContext:
        """The context of a forward inside the block: the prompts, after the attached prefix if one is active."""
        reader = self.reader
        if selection is not None and len(selection.names) > 1:
            raise fail("names", "a mixed batch beside a shared prompt", "one prefix for all rows")
        rows = self.shared.rows(reader.facts.layers.batch_size(kwargs))
        used = sorted(set(rows))
        front = None if selection is None else reader.read_names(selection, kwargs)
        offset = 0 if front is None else front.offset
        assert isinstance(offset, int)
        if front is not None and front.concatenated is not None:
            raise fail("model", "a soft prompt that has to be concatenated", "one that can be shared, or none")
        longest = max(len(self.prompts[n]) for n in used)
        reason = why_not_shareable(reader.facts, longest + offset, kwargs, embedded=False)
        if reason is not None:
            return self.concatenate(rows, front, kwargs, reason)
        version = (tuple(used), selection)
        bank = reader.cache.get(kwargs, ("shared", self.number), version)
        if not isinstance(bank, PrefixBank):
            prefilled = reader.prefill.run([self.prompts[n] for n in used], front)
            in_front = self._layers_in_front(front)
            layers = [pack([_join(own, kv[i]) for kv in prefilled.key_values]) for i, own in enumerate(in_front)]
            bank = PrefixBank(list(used), [offset + len(self.prompts[n]) for n in used], layers, list(prefilled.last))
            reader.cache.put(kwargs, ("shared", self.number), version, bank)
        return reader.choose(bank, AdapterSelection(tuple(rows)), kwargs)

    def concatenate(
        self, rows: list[int], front: ForwardContext | None, kwargs: dict[str, Any], reason: str
    ) -> ForwardContext:
        """The context that concatenates each row's prompt to it, padded on the left."""
        refuse_cache(kwargs, reason)
        self.reader.warn.concatenation(reason)
        longest = max(len(prompt) for prompt in self.prompts)
        offset = 0 if front is None else front.offset
        lengths = torch.tensor([[len(self.prompts[n])] for n in rows])
        ragged = len({len(prompt) for prompt in self.prompts}) > 1
        nothing: KeyValues = [None] * len(self.slots)
        context = ForwardContext(lengths + offset, nothing if front is None else front.layers)
        ids = torch.stack([nn.functional.pad(self.prompts[n], (longest - len(self.prompts[n]), 0)) for n in rows])
        context.concatenated_ids = ids
        context.concatenated = self.reader.facts.model.get_input_embeddings()(ids)
        assert isinstance(offset, int)
        context.concatenated_from = offset
        if ragged:
            context.concatenated_mask = (torch.arange(longest) >= longest - lengths).long().to(ids.device)
        return context

    def _layers_in_front(self, front: ForwardContext | None) -> KeyValues:
        """The keys and values that each layer reads in front of the prompts."""
        if front is None:
            return [None] * len(self.slots)
        return [slot() for slot in self.slots] if front.layers is None else front.layers


def _join(first: LayerKV | None, kv: LayerKV | None) -> LayerKV | None:
    """One layer's keys and values of two prefixes, the second after the first."""
    if first is None or kv is None:
        return kv if first is None else first
    return LayerKV(torch.cat([first.k, kv.k], 1), torch.cat([first.v, kv.v], 1))


@contextmanager
def shared_prompt(model: Any, input_ids: Any, groups: Any = None) -> Iterator[SharedPrompt]:
    """Let all rows inside the block share a prompt - a system prompt, few-shot examples - that is computed once.

    Every forward of a causal model inside the block behaves as if its row's prompt stood in front of the row. The
    prompt runs through the model once, separately from the batch, and every row reads its keys and values. Gradients
    flow through rows and prompt alike into all trainable parameters of the model (LoRA, or all of them). Logits and
    labels are those of the rows' own tokens; with ``labels``, the loss counts a row's first token too, which the prompt
    predicts. The logits are a view: use ``reshape``, not ``view``. Generation computes the prompt once for its cache.
    An attached prefix stands in front of the prompt.

    Where sharing would not be exact (bidirectional models, active dropout, rows that outgrow a sliding window) the
    prompt is concatenated to every row, with a warning; with a cache this raises and asks for ``use_cache=False``.

    Args:
        model: a transformers model that can carry a prefix, or a PeftModel around one (LoRA; patched ones).
            Nothing is frozen. Idle slots stay in the model after the block; :func:`detach` takes them out.
        input_ids: ``[P]`` token ids; or N prompts, ``[N, P]`` or sequences of different lengths.
        groups: ``[B]`` ints, each row's prompt; needed when there are several (GRPO: one prompt, many completions).

    Yields:
        A :class:`SharedPrompt`, whose ``next_logits`` are the prompt's prediction of each row's first token.

    Raises:
        ValueError: an argument does not fit, or the model cannot carry a prefix.
    """
    bare = _bare(model)
    probing.check_model(bare)
    check_tokens(bare)
    prompts = prompts_of(input_ids, offload.device(bare.get_input_embeddings()))
    chosen = None if groups is None else torch.as_tensor(groups).reshape(-1).cpu()
    if chosen is None and len(prompts) > 1:
        raise fail("groups", "None", f"the prompt of each row, as there are {len(prompts)} prompts")
    if chosen is not None and (chosen.is_floating_point() or not len(chosen)):
        raise fail("groups", repr(groups), "[B] ints")
    if chosen is not None and not 0 <= int(chosen.min()) <= int(chosen.max()) < len(prompts):
        raise fail("groups", f"{int(chosen.min())}..{int(chosen.max())}", f"0..{len(prompts) - 1}")
    found = find_installation(bare)
    fresh = found is None
    installation = install(bare) if found is None else found
    try:
        check_prompts(installation.facts)
    except ValueError:
        if fresh:
            uninstall(installation)
        raise
    if installation.selection.shared is not None or installation.selection.chosen is not None:
        raise fail("input_ids", "a shared prompt inside another block", "one block of shared_prompt or prefix_batch")
    if installation.selection.provider.gated:
        raise fail("model", "one with gated prompts (ADAPTION_PROMPT)", "one without: they are read beside the content")
    shared = SharedPrompt(prompts, chosen)
    block = _PromptBlock(shared, installation.reader, installation.slots)
    with installation.lock.block(), installation.selection.sharing(block), installation.configs.switched_on():
        yield shared


def _bare(model: Any) -> Any:
    """The transformers model inside a PeftModel; any other model itself."""
    config = getattr(model, "active_peft_config", None) if hasattr(model, "get_base_model") else None
    if config is None:
        return model
    bare = model.get_base_model()
    if config.is_prompt_learning and find_installation(bare) is None:
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
