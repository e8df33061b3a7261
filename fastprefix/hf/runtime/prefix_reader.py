"""What the attention layers read beside their content in one forward, and from where."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from fastprefix.hf.model import dtensor as sharded
from fastprefix.hf.runtime import exactness
from fastprefix.hf.runtime import prompt_prefill as sharing
from fastprefix.hf.runtime.prompt_prefill import KeyValues
from fastprefix.prefixes.prefix import LayerKV
from fastprefix.validation import fail

if TYPE_CHECKING:
    from fastprefix.hf.adapters.installation import Installation

Name = Hashable


class Entry(NamedTuple):
    """One prefix (``key_values``) or soft prompt (``prompt``)."""

    kind: str  # in words
    tokens: int  # P
    offset: int  # positions that content behind it is shifted by
    parameters: tuple[Tensor, ...]  # what it is computed from
    key_values: Callable[[], KeyValues] | None = None
    prompt: Callable[[], Tensor] | None = None  # [P, d]
    layers: int | None = None  # how many have a prefix


class Source(Protocol):
    """Where names lead to: what was attached, or a PEFT model's adapters."""

    beside: bool

    def names(self) -> list[str]: ...

    def resident(self) -> list[str]: ...

    def active(self) -> Choice | None: ...

    def enabled(self) -> bool: ...

    def entry(self, name: Name) -> Entry: ...

    def held(self, choice: Choice) -> AbstractContextManager[None]: ...


class Choice(NamedTuple):
    """Which names a batch reads: one for all rows, or one for each (None: the bare model)."""

    names: tuple[Name | None, ...]

    def distinct(self) -> list[Name]:
        """Without repetitions, in order."""
        return list(dict.fromkeys(name for name in self.names if name is not None))

    def rows(self, batch: int) -> list[Name | None]:
        """A name for each row of a batch; beams and returned sequences lie behind one another."""
        if batch % len(self.names):
            expected = f"one for each of the batch's {batch} rows"
            raise fail("names", f"{len(self.names)} names", expected)
        return [name for name in self.names for _ in range(batch // len(self.names))]


@dataclass
class Bank:
    """Prefixes that a batch chooses from, layer by layer, and what stands behind each."""

    names: list[Name]
    offsets: list[int]
    layers: list[LayerKV | None]  # packed: [H_kv, sum of P, D] with lens [N]; of a single prefix without
    last: list[Tensor | None]  # [d], hidden state of a prompt's last token


@dataclass
class Reading:
    """What one forward reads."""

    offset: int | Tensor = 0  # of content positions; [B, 1]
    layers: list[LayerKV | None] | None = None  # None: every layer asks for the active prefix
    last: Tensor | None = None  # [B or 1, d], hidden state behind each row's prompt
    concatenated: Tensor | None = None  # [B or 1, P, d], embeddings in front of every row instead
    concatenated_ids: Tensor | None = None  # [B or 1, P], where they are tokens
    concatenated_mask: Tensor | None = None  # [B or 1, P]
    concatenated_from: int = 0  # the position of their first
    beside: bool = False  # the model's own attention, masks and positions stay; a gated prompt is added
    padding: Tensor | None = None  # [B], places in front of a row's first token
    leaves: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # see checkpointing.Bridge

    def tensors(self) -> list[Tensor]:
        """Keys and values that want a gradient."""
        given = [kv for kv in self.layers or () if kv is not None]
        return [x for kv in given for x in (kv.k, kv.v, kv.gate) if x is not None and x.requires_grad]


def batch_size(state: Installation, kwargs: dict[str, Any]) -> int:
    """Rows of a forward."""
    names = [*(stack.main_input for stack in state.layers.stacks), "inputs_embeds"]
    given = [kwargs[name] for name in names if kwargs.get(name) is not None]
    if not given:
        raise fail(names[-2], f"neither {names[-2]} nor inputs_embeds", "one of them")
    return int(given[0].shape[0])


def read(state: Installation, choice: Choice, kwargs: dict[str, Any]) -> Reading | None:
    """What a choice of names means in a forward; runs soft prompts through the model."""
    names = choice.distinct()
    if not names:
        return None
    entries = [state.source.entry(name) for name in names]
    prompts = [entry for entry in entries if entry.prompt is not None]
    if prompts:
        reason = exactness.inexact(state, max(entry.tokens for entry in prompts), kwargs)
        if reason is not None:
            return _concatenate(state, choice, names, entries, kwargs, reason)
    if state.prepared is not None:
        return choose(state, state.prepared, choice, kwargs)
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return choose(state, make_bank(state, names, entries)[0], choice, kwargs)
    key = tuple((entry.offset, *map(_stamp, entry.parameters)) for entry in entries)
    bank = state.memo.recall(kwargs, tuple(names), key)
    if not isinstance(bank, Bank):
        bank, _ = make_bank(state, names, entries)
        state.memo.remember(kwargs, tuple(names), key, bank)
    return choose(state, bank, choice, kwargs)


def _stamp(x: Tensor) -> tuple[int, int]:
    """What changes when a parameter's numbers do."""
    return x.data_ptr(), 0 if x.is_inference() else x._version


def make_bank(
    state: Installation,
    names: Sequence[Name],
    entries: Sequence[Entry],
    module: nn.Module | None = None,
    options: dict[str, Any] | None = None,
) -> tuple[Bank, Any]:
    """Keys and values of these names, computed; and what came of the module that soft prompts ran through, if any."""
    embeds = [entry.prompt() for entry in entries if entry.prompt is not None]
    output = None
    sharded.refuse_bank(p for entry in entries if entry.prompt is None for p in entry.parameters)
    made: Iterator[tuple[KeyValues, Tensor]] = iter([])
    if embeds:
        run = sharing.run(state, embeds, module=module, options=options)
        output = run.output
        made = iter(zip(run.key_values, run.last, strict=True))
    found: list[KeyValues] = []
    last: list[Tensor | None] = []
    for entry in entries:
        if entry.key_values is not None:
            found.append(entry.key_values())
            last.append(None)
        else:
            key_values, hidden = next(made)
            found.append(key_values)
            last.append(hidden)
    layers = [pack([pairs[i] for pairs in found]) for i in range(len(state.slots))]
    return Bank(list(names), [entry.offset for entry in entries], layers, last), output


def pack(pairs: Sequence[LayerKV | None]) -> LayerKV | None:
    """One layer's keys and values behind one another: as much memory as they take, and nothing for padding."""
    present = [kv for kv in pairs if kv is not None]
    if not present:
        return None
    if len(pairs) == 1:
        return present[0]
    lens = torch.tensor([0 if kv is None else kv.k.shape[1] for kv in pairs], device=present[0].k.device)
    return LayerKV(torch.cat([kv.k for kv in present], 1), torch.cat([kv.v for kv in present], 1), lens=lens)


def choose(state: Installation, bank: Bank, choice: Choice, kwargs: dict[str, Any]) -> Reading:
    """Each row's prefix of a bank."""
    if not set(choice.distinct()) <= set(bank.names):
        raise AssertionError(f"a bank of {bank.names} for rows of {choice.distinct()}")
    if len(bank.names) == 1 and None not in choice.names:
        last = bank.last[0]
        choice.rows(batch_size(state, kwargs))
        return Reading(bank.offsets[0], bank.layers, None if last is None else last[None], beside=state.source.beside)
    if any(kv is not None and kv.gate is not None for kv in bank.layers):
        raise fail("names", "a mixed batch of gated prompts", "one for all rows")
    index = {name: i for i, name in enumerate(bank.names)}
    rows = [-1 if name is None else index[name] for name in choice.rows(batch_size(state, kwargs))]
    ids: dict[torch.device, Tensor] = {}
    layers: list[LayerKV | None] = []
    for kv in bank.layers:
        if kv is not None:
            device = kv.k.device
            ids.setdefault(device, torch.tensor(rows, device=device))
            lens = torch.tensor([kv.k.shape[1]], device=device) if kv.lens is None else kv.lens
            kv = kv._replace(ids=ids[device], lens=lens)
        layers.append(kv)
    reading = Reading(torch.tensor([[0 if i < 0 else bank.offsets[i]] for i in rows]), layers)
    hidden = [None if i < 0 else bank.last[i] for i in rows]
    some = next((x for x in hidden if x is not None), None)
    if some is not None:
        reading.last = torch.stack([torch.zeros_like(some) if x is None else x for x in hidden])
    return reading


def _concatenate(
    state: Installation,
    choice: Choice,
    names: Sequence[Name],
    entries: Sequence[Entry],
    kwargs: dict[str, Any],
    reason: str,
) -> Reading:
    """A reading that puts embeddings in front of every row, as sharing them would not be exact."""
    tokens = entries[0].tokens
    if None in choice.names or any(entry.prompt is None or entry.tokens != tokens for entry in entries):
        got = f"a mixed batch with soft prompts that have to be concatenated ({reason})"
        raise fail("names", got, "soft prompts of one length in every row, and nothing else")
    sharing.refuse_cache(kwargs, reason)
    sharing.say(state, reason)
    prompts = torch.stack([entry.prompt() for entry in entries if entry.prompt is not None])  # [N, P, d]
    if len(names) > 1:
        rows = [list(names).index(name) for name in choice.rows(batch_size(state, kwargs))]
        prompts = prompts[torch.tensor(rows, device=prompts.device)]
    return Reading(tokens, [None] * len(state.slots), concatenated=prompts)
