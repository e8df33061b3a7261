"""An open block of ``shared_prompt``: it runs its prompts, and gives every row of a forward its own one to read."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastprefix.errors import fail
from fastprefix.hf.runtime.exactness import why_not_shareable
from fastprefix.hf.runtime.forward_context import AdapterSelection, ForwardContext, KeyValues, PrefixBank
from fastprefix.hf.runtime.prefix_reader import PrefixReader, pack
from fastprefix.hf.runtime.prompt_prefill import refuse_cache
from fastprefix.hf.runtime.slots import AttentionSlots
from fastprefix.prefixes.kv import LayerKV, concatenate

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


class _Prefilled(NamedTuple):
    """What rows read of one prompt and of everything in front of it."""

    end: int  # position of the token behind the prompt
    key_values: KeyValues
    last: Tensor  # [d], hidden state of the prompt's last token


class PromptBlock:
    """An open block, which reads a :class:`SharedPrompt`; the user's object outlives it and holds no model.

    Args:
        shared: the prompts.
        reader, slots: of the model.
        outer: the block around this one, whose prompts stand in front of these ones: its groups tell which.
        starts: position of each prompt's first token; by default the one behind what stands in front.
    """

    def __init__(
        self,
        shared: SharedPrompt,
        reader: PrefixReader,
        slots: AttentionSlots,
        outer: PromptBlock | None = None,
        starts: Sequence[int] | None = None,
    ) -> None:
        self.shared, self.prompts, self.number = shared, shared.prompts, shared.number
        self.reader, self.slots, self.outer, self.starts = reader, slots, outer, starts
        self.parents = [0] * len(self.prompts) if outer is None else outer.shared.rows(len(self.prompts))

    def predict(self, next_logits: Tensor) -> None:
        """Keep ``[B, V]``, the prompt's prediction of each row's first token."""
        self.shared.next_logits = next_logits

    def whole(self, n: int) -> Tensor:
        """The tokens of prompt n with those of the outer prompts in front."""
        own = self.prompts[n]
        return own if self.outer is None else torch.cat([self.outer.whole(self.parents[n]), own])

    def read(self, selection: AdapterSelection | None, kwargs: dict[str, Any]) -> ForwardContext:
        """The context of a forward inside the block: the prompts, after the attached prefix if one is active."""
        reader = self.reader
        if selection is not None and len(selection.names) > 1:
            raise fail("names", "a mixed batch beside a shared prompt", "one prefix for all rows")
        if (kind := reader.selection.added()) is not None:
            got = f"a {kind} beside a shared prompt"
            raise fail("prefix", got, "one that stands in front of the prompt, or none (set_prefix)")
        rows = self.shared.rows(reader.facts.layers.batch_size(kwargs))
        used = sorted(set(rows))
        front = None if selection is None else reader.read_names(selection, kwargs)
        offset = 0 if front is None else front.offset
        assert isinstance(offset, int)
        if front is not None and front.inserted is not None:
            got = f"{front.inserted.place!r} of a soft prompt in a block of shared_prompt"
            raise fail("place", got, "'before': it stands in front of the prompt that rows share")
        if front is not None and front.concatenated is not None:
            raise fail("model", "a soft prompt that has to be concatenated", "one that can be shared, or none")
        longest = max(len(self.whole(n)) for n in used)
        reason = why_not_shareable(reader.facts, longest + offset, kwargs, embedded=False)
        if reason is not None:
            return self.concatenate(rows, front, kwargs, reason)
        version = (tuple(used), selection)
        bank = reader.cache.get(kwargs, ("shared", self.number), version)
        if not isinstance(bank, PrefixBank):
            bank = _bank(self.prefill(used, front), used)
            reader.cache.put(kwargs, ("shared", self.number), version, bank)
        return reader.choose(bank, AdapterSelection(tuple(rows)), kwargs)

    def prefill(self, used: Sequence[int], front: ForwardContext | None) -> dict[int, _Prefilled]:
        """Run these prompts, each behind the prompt of the outer block that it belongs to, as one batch."""
        prompts = [self.prompts[n] for n in used]
        if self.outer is None:
            before = 0 if front is None else front.offset
            assert isinstance(before, int)
            in_front, starts = [self._layers_in_front(front)] * len(used), [before] * len(used)
            context = front
        else:
            parents = [self.parents[n] for n in used]
            above = self.outer.prefill(sorted(set(parents)), front)
            in_front, starts = [above[p].key_values for p in parents], [above[p].end for p in parents]
            batch = {"input_ids": torch.empty(len(used), 1, dtype=torch.long)}
            context = self.reader.choose(_bank(above, sorted(above)), AdapterSelection(tuple(parents)), batch)
            context = replace(context, last=None)
        if self.starts is not None:
            starts = [before + self.starts[n] for before, n in zip(starts, used, strict=True)]
            context = context or ForwardContext(layers=[None] * len(self.slots))
            context = replace(context, offset=torch.tensor(starts)[:, None])
        result = self.reader.prefill.run(prompts, context)
        found: dict[int, _Prefilled] = {}
        for i, n in enumerate(used):
            joined = [_join(*pair) for pair in zip(in_front[i], result.key_values[i], strict=True)]
            found[n] = _Prefilled(starts[i] + len(prompts[i]), joined, result.last[i])
        return found

    def concatenate(
        self, rows: list[int], front: ForwardContext | None, kwargs: dict[str, Any], reason: str
    ) -> ForwardContext:
        """The context that concatenates each row's prompt to it, padded on the left."""
        refuse_cache(kwargs, reason)
        self.reader.warn.concatenation(reason)
        prompts = [self.whole(n) for n in range(len(self.prompts))]
        longest = max(len(prompt) for prompt in prompts)
        offset = 0 if front is None else front.offset
        lengths = torch.tensor([[len(prompts[n])] for n in rows])
        ragged = len({len(prompt) for prompt in prompts}) > 1
        nothing: KeyValues = [None] * len(self.slots)
        context = ForwardContext(lengths + offset, nothing if front is None else front.layers)
        ids = torch.stack([nn.functional.pad(prompts[n], (longest - len(prompts[n]), 0)) for n in rows])
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


def _bank(prefilled: dict[int, _Prefilled], used: Sequence[int]) -> PrefixBank:
    """Pack prefilled prompts, so that each row of a batch can read one of them by its number."""
    chosen = [prefilled[n] for n in used]
    layers = [pack([prompt.key_values[i] for prompt in chosen]) for i in range(len(chosen[0].key_values))]
    return PrefixBank(list(used), [prompt.end for prompt in chosen], layers, [prompt.last for prompt in chosen])


def _join(first: LayerKV | None, kv: LayerKV | None) -> LayerKV | None:
    """One layer's keys and values of two prefixes, the second after the first."""
    if first is None or kv is None:
        return kv if first is None else first
    return concatenate([first, kv])
