"""Turns the prefix names that are selected for a forward into a :class:`ForwardContext`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastprefix.errors import fail
from fastprefix.hf.model import dtensor
from fastprefix.hf.model.facts import ModelFacts
from fastprefix.hf.runtime.exactness import why_not_shareable
from fastprefix.hf.runtime.forward_context import (
    AdapterSelection,
    ForwardContext,
    ForwardState,
    Insertion,
    KeyValues,
    Name,
    PrefixBank,
    ResolvedPrefix,
)
from fastprefix.hf.runtime.prompt_kv_cache import PromptKVCache
from fastprefix.hf.runtime.prompt_prefill import PromptPrefill, refuse_cache
from fastprefix.hf.runtime.selection import Selection
from fastprefix.hf.runtime.warn_once import WarnOnce
from fastprefix.prefixes.kv import LayerKV, concatenate
from fastprefix.prefixes.prefix import Prefix


class PrefixReader:
    """Makes the :class:`ForwardContext` of each forward of one model, and runs its soft prompts for that."""

    def __init__(
        self, facts: ModelFacts, selection: Selection, forward: ForwardState, prefill: PromptPrefill, warn: WarnOnce
    ) -> None:
        self.facts, self.selection, self.forward, self.prefill, self.warn = facts, selection, forward, prefill, warn
        self.cache = PromptKVCache()

    def read(self, kwargs: dict[str, Any], encoded: bool = False) -> ForwardContext | None:
        """The context of a forward with these keyword arguments; None for the bare model.

        ``encoded``: whether the forward is a decoder's, whose encoder has soft prompts in front of its rows.
        """
        current = self.selection.current()
        if self.selection.shared is not None:
            return self.selection.shared.read(current, kwargs)
        return None if current is None else self.read_names(current, kwargs, encoded)

    def read_names(
        self, selected: AdapterSelection, kwargs: dict[str, Any], encoded: bool = False
    ) -> ForwardContext | None:
        """The context for a selection of names; soft prompts run through the model for it. None without a name."""
        active, prefixes = self.selection.active, self.selection.prefixes
        if len(selected.names) == 1 and selected.names[0] == active and active in prefixes:
            prefix = prefixes[active]
            if isinstance(prefix, Prefix):
                return ForwardContext(prefix.offset)
        names = selected.distinct()
        if not names:
            return None
        resolved = [self.selection.provider.resolve(name) for name in names]
        prompts = [prefix for prefix in resolved if prefix.prompt is not None]
        if any(prefix.place != "before" for prefix in prompts):
            return self._insert(selected, names, resolved, kwargs)
        if prompts:
            reason = why_not_shareable(self.facts, max(prefix.tokens for prefix in prompts), kwargs)
            if reason is not None:
                return self._concatenate(selected, names, resolved, kwargs, reason, encoded)
        if self.forward.prepared is not None:
            return self.choose(self.forward.prepared, selected, kwargs)
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return self.choose(self.make_bank(names, resolved)[0], selected, kwargs)
        version = tuple((prefix.offset, *map(_version, prefix.parameters())) for prefix in resolved)
        bank = self.cache.get(kwargs, tuple(names), version)
        if not isinstance(bank, PrefixBank):
            bank, _ = self.make_bank(names, resolved)
            self.cache.put(kwargs, tuple(names), version, bank)
        return self.choose(bank, selected, kwargs)

    def make_bank(
        self,
        names: Sequence[Name],
        resolved: Sequence[ResolvedPrefix],
        module: nn.Module | None = None,
        options: dict[str, Any] | None = None,
    ) -> tuple[PrefixBank, Any]:
        """Compute the keys and values of these prefixes.

        Args:
            names: names of the prefixes.
            resolved: the prefixes themselves.
            module: the module that soft prompts run through; default the part of the model around all layers.
            options: further keyword arguments of that module's forward.

        Returns:
            The bank, and the output of the module that soft prompts ran through (None without any).
        """
        if len({prefix.added for prefix in resolved}) > 1:
            kinds = " and ".join(f"{name!r}, a {prefix.kind}" for name, prefix in zip(names, resolved, strict=True))
            raise fail("names", kinds, "in one batch prefixes with gates, or none of them with a gate")
        embeddings = [prefix.prompt() for prefix in resolved if prefix.prompt is not None]
        output = None
        stored = (p for prefix in resolved if prefix.prompt is None for p in prefix.parameters())
        dtensor.refuse_bank(stored, self.facts.layers.shards)
        prefilled: Iterator[tuple[KeyValues, Tensor]] = iter([])
        if embeddings:
            result = self.prefill.run(embeddings, module=module, options=options)
            output = result.output
            prefilled = iter(zip(result.key_values, result.last, strict=True))
        found: list[KeyValues] = []
        last: list[Tensor | None] = []
        for prefix in resolved:
            if prefix.key_values is not None:
                found.append(prefix.key_values())
                last.append(None)
            else:
                key_values, hidden = next(prefilled)
                found.append(key_values)
                last.append(hidden)
        if len(names) > 1:
            _refuse_memories(kv for pairs in found for kv in pairs)
        layers = [pack([pairs[i] for pairs in found]) for i in range(len(self.facts.layers.modules))]
        return PrefixBank(list(names), [prefix.offset for prefix in resolved], layers, last), output

    def choose(self, bank: PrefixBank, selected: AdapterSelection, kwargs: dict[str, Any]) -> ForwardContext:
        """The context in which each row of a forward reads its own prefix of a bank."""
        if not set(selected.distinct()) <= set(bank.names):
            raise AssertionError(f"a bank of {bank.names} for rows of {selected.distinct()}")
        batch = self.facts.layers.batch_size(kwargs)
        if len(bank.names) == 1 and None not in selected.names:
            last = bank.last[0]
            selected.rows(batch)
            gated = self.selection.provider.gated
            return ForwardContext(bank.offsets[0], bank.layers, None if last is None else last[None], gated=gated)
        _refuse_memories(bank.layers)
        if self.selection.provider.gated:
            raise fail("names", "a mixed batch of gated prompts", "one for all rows")
        index = {name: i for i, name in enumerate(bank.names)}
        rows = [-1 if name is None else index[name] for name in selected.rows(batch)]
        ids: dict[torch.device, Tensor] = {}
        layers: KeyValues = []
        for kv in bank.layers:
            if kv is not None:
                device = kv.k.device
                ids.setdefault(device, torch.tensor(rows, device=device))
                lens = torch.tensor([kv.k.shape[1]], device=device) if kv.lens is None else kv.lens
                gate = None if kv.gate is None else _of_rows(kv.gate, ids[device])
                kv = kv._replace(ids=ids[device], lens=lens, gate=gate)
            layers.append(kv)
        context = ForwardContext(torch.tensor([[0 if i < 0 else bank.offsets[i]] for i in rows]), layers)
        hidden = [None if i < 0 else bank.last[i] for i in rows]
        some = next((x for x in hidden if x is not None), None)
        if some is not None:
            context.last = torch.stack([torch.zeros_like(some) if x is None else x for x in hidden])
        return context

    def _concatenate(
        self,
        selected: AdapterSelection,
        names: Sequence[Name],
        resolved: Sequence[ResolvedPrefix],
        kwargs: dict[str, Any],
        reason: str,
        encoded: bool,
    ) -> ForwardContext:
        """The context that concatenates soft prompts to every row, where sharing them would not be exact."""
        what = f"soft prompts that have to be concatenated ({reason})"
        layers: KeyValues = [None] * len(self.facts.layers.modules)
        if encoded:
            self._check_rows(selected, resolved, what)
            return ForwardContext(layers=layers, encoded=resolved[0].tokens)
        refuse_cache(kwargs, reason)
        self.warn.concatenation(reason)
        prompts = self._of_rows(selected, names, resolved, kwargs, what)
        return ForwardContext(prompts.shape[1], layers, concatenated=prompts)

    def _insert(
        self,
        selected: AdapterSelection,
        names: Sequence[Name],
        resolved: Sequence[ResolvedPrefix],
        kwargs: dict[str, Any],
    ) -> ForwardContext:
        """The context that puts soft prompts into every row, at their places."""
        places = list(dict.fromkeys(prefix.place for prefix in resolved))
        if len(places) > 1:
            got = f"soft prompts with different places: {', '.join(map(repr, places))}"
            raise fail("names", got, "one place for all rows")
        prompts = self._of_rows(selected, names, resolved, kwargs, "soft prompts inside the text")
        insertion = Insertion(places[0], prompts, self.forward.labels)
        return ForwardContext(0, [None] * len(self.facts.layers.modules), inserted=insertion)

    def _check_rows(self, selected: AdapterSelection, resolved: Sequence[ResolvedPrefix], what: str) -> None:
        """Raise ValueError unless every row has a soft prompt of one length; ``what`` they are, for errors."""
        tokens = resolved[0].tokens
        if None in selected.names or any(prefix.prompt is None or prefix.tokens != tokens for prefix in resolved):
            raise fail(
                "names", f"a mixed batch with {what}", "soft prompts of one length in every row, and nothing else"
            )

    def _of_rows(
        self,
        selected: AdapterSelection,
        names: Sequence[Name],
        resolved: Sequence[ResolvedPrefix],
        kwargs: dict[str, Any],
        what: str,
    ) -> Tensor:
        """``[B or 1, P, d]``, the embeddings of each row's soft prompt; ``what`` they are, for errors."""
        self._check_rows(selected, resolved, what)
        prompts = torch.stack([prefix.prompt() for prefix in resolved if prefix.prompt is not None])  # [N, P, d]
        if len(names) == 1:
            return prompts
        rows = [list(names).index(name) for name in selected.rows(self.facts.layers.batch_size(kwargs))]
        return prompts[torch.tensor(rows, device=prompts.device)]


def pack(pairs: Sequence[LayerKV | None]) -> LayerKV | None:
    """Concatenate one layer's prefixes along P, without padding; None without any."""
    present = [kv for kv in pairs if kv is not None]
    if not present:
        return None
    if len(pairs) == 1:
        return present[0]
    lens = torch.tensor([0 if kv is None else kv.k.shape[1] for kv in pairs], device=present[0].k.device)
    packed = concatenate(present)._replace(lens=lens)
    some = present[0].gate
    if some is None:
        return packed
    gates = [some.new_zeros(some.shape) if kv is None or kv.gate is None else kv.gate for kv in pairs]
    return packed._replace(gate=torch.stack(gates))


def _refuse_memories(found: Iterable[LayerKV | None]) -> None:
    """Raise ValueError where a mixed batch has a prefix memory, which is no part of a bank."""
    if any(kv is not None and kv.memory is not None for kv in found):
        raise fail("names", "a prefix memory in a mixed batch", "one memory for all rows")


def _of_rows(gate: Tensor, ids: Tensor) -> Tensor:
    """``[B, H]``, the gate of each row's prefix (id -1: none, and 0), of one gate ``[H]`` or a bank's, ``[N, H]``."""
    bank = gate.reshape(-1, gate.shape[-1])
    return torch.cat([bank, bank.new_zeros(1, bank.shape[1])])[ids]


def _version(x: Tensor) -> tuple[int, int]:
    """A pair that changes when a parameter's values are changed."""
    return x.data_ptr(), 0 if x.is_inference() else x._version
