"""The provider of prefixes that :func:`fastprefix.attach` attached or :func:`fastprefix.register` keeps on disk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from fastprefix.errors import fail
from fastprefix.hf.adapters.modules_to_save import TrainedModules
from fastprefix.hf.runtime.forward_context import AdapterSelection, KeyValues, Name, ResolvedPrefix
from fastprefix.hf.runtime.selection import Selection
from fastprefix.prefixes.kv import LayerKV, concatenate
from fastprefix.prefixes.prefix import Prefix
from fastprefix.prefixes.prompt import SoftPrompt


class StoredPrefixes(Protocol):
    """Prefixes on disk, the most recently used of them in memory (see storage/registry.py)."""

    paths: dict[str, Path]

    @property
    def resident(self) -> Mapping[str, Prefix | SoftPrompt]:
        """The prefixes in memory, by name."""
        ...

    def get(self, name: str) -> Prefix | SoftPrompt:
        """The prefix of a name, read from disk unless it is in memory."""
        ...

    def pin(self, names: Sequence[Name]) -> AbstractContextManager[None]:
        """Keep these prefixes in memory inside the block."""
        ...

    def forget(self, name: str) -> None:
        """Drop a prefix from memory, and its name; its files stay."""
        ...


class AttachedPrefixes:
    """The ``PrefixProvider`` of prefixes that are attached to a model or registered on disk."""

    gated = False

    def __init__(self, selection: Selection, num_layers: int, modules: TrainedModules) -> None:
        self.selection, self.num_layers, self.modules_in_model = selection, num_layers, modules
        self.registry: StoredPrefixes | None = None

    def names(self) -> list[str]:
        """Names of attached prefixes, then of those on disk."""
        return [*self.selection.prefixes, *(self.registry.paths if self.registry is not None else ())]

    def resident(self) -> list[str]:
        """Names of the prefixes in memory."""
        return [*self.selection.prefixes, *(self.registry.resident if self.registry is not None else ())]

    def in_memory(self) -> list[Prefix | SoftPrompt]:
        """The prefixes in memory."""
        resident = () if self.registry is None else self.registry.resident.values()
        return [*self.selection.prefixes.values(), *resident]

    def enabled(self) -> bool:
        """Always True: there is no switch."""
        return True

    def active(self) -> AdapterSelection | None:
        """The active prefix, for all rows; None without one."""
        return None if self.selection.active is None else AdapterSelection((self.selection.active,))

    def resolve(self, name: Name) -> ResolvedPrefix:
        """The prefix of a name, or several behind each other, resolved; raises ValueError where there is none."""
        found = [resolve(self.prefix(part), self.num_layers) for part in parts(name)]
        return found[0] if len(found) == 1 else behind_each_other(found, name)

    def prefix(self, name: Name) -> Prefix | SoftPrompt:
        """The prefix attached under a name, or read from disk; raises ValueError where there is none."""
        prefix = self.selection.prefixes.get(name) if isinstance(name, str) else None
        if prefix is None:
            if self.registry is None or name not in self.registry.paths:
                raise fail("names", repr(name), f"None or one of {sorted(self.names())}")
            prefix = self.registry.get(str(name))
        return prefix

    def modules(self, name: Name | None) -> dict[str, nn.Module]:
        """A prefix's trained copies of the model's modules, by path.

        Raises:
            ValueError: of several prefixes behind each other two have copies of one module.
        """
        found: dict[str, nn.Module] = {}
        for part in () if name is None else parts(name):
            own = self.prefix(part).modules_to_save.named()
            if both := sorted(found.keys() & own.keys()):
                raise fail("names", f"{name!r}, of which two have trained {both[0]!r}", "at most one that has")
            found.update(own)
        return found

    @contextmanager
    def held(self, selection: AdapterSelection) -> Iterator[None]:
        """Keep registered prefixes in memory inside the block, and let every row use its own prefix's modules."""
        used = [part for name in selection.distinct() for part in parts(name)]
        with nullcontext() if self.registry is None else self.registry.pin(used):
            modules = {name: self.modules(name) for name in dict.fromkeys(selection.names)}
            with self.modules_in_model.rows(selection, modules):
                yield


def parts(name: Name) -> tuple[Name, ...]:
    """The names of prefixes that a row reads behind each other: one, or those of a tuple."""
    return name if isinstance(name, tuple) else (name,)


def behind_each_other(prefixes: Sequence[ResolvedPrefix], name: Name) -> ResolvedPrefix:
    """Several prefixes as one; soft prompts as one prompt, whose tokens see those before them.

    Raises:
        ValueError: soft prompts and prefixes are mixed, or soft prompts of different places, or one is added through a
            gate.
    """
    for prefix in prefixes:
        if prefix.added:
            expected = "prefixes that one softmax reads behind each other"
            raise fail("names", f"{name!r} with a {prefix.kind}, whose output is added to the content's", expected)
    prompts = [prefix.prompt for prefix in prefixes if prefix.prompt is not None]
    if prompts and len(prompts) < len(prefixes):
        kinds = " and ".join(dict.fromkeys(prefix.kind for prefix in prefixes))
        raise fail("names", f"{name!r} of a {kinds}", "soft prompts alone or prefixes alone behind each other")
    places = list(dict.fromkeys(prefix.place for prefix in prefixes))
    if len(places) > 1:
        got = f"{name!r} of soft prompts with different places: {', '.join(map(repr, places))}"
        raise fail("names", got, "soft prompts of one place behind each other")

    def parameters() -> Iterator[Tensor]:
        for prefix in prefixes:
            yield from prefix.parameters()

    def key_values() -> KeyValues:
        found = [prefix.key_values() for prefix in prefixes if prefix.key_values is not None]
        return [joined([kv for kv in layer if kv is not None]) for layer in zip(*found, strict=True)]

    kind, tokens, offset = prefixes[0].kind, sum(x.tokens for x in prefixes), sum(x.offset for x in prefixes)
    if prompts:
        return ResolvedPrefix(
            kind,
            tokens,
            offset,
            parameters,
            prompt=lambda: torch.cat([prompt() for prompt in prompts]),
            place=places[0],
        )
    return ResolvedPrefix(kind, tokens, offset, parameters, key_values, layers=max(x.layers or 0 for x in prefixes))


def joined(pairs: Sequence[LayerKV]) -> LayerKV | None:
    """One layer's keys and values of several prefixes, behind each other; None without any."""
    if len(pairs) < 2:
        return pairs[0] if pairs else None
    return concatenate(pairs)


def resolve(prefix: Prefix | SoftPrompt, num_layers: int) -> ResolvedPrefix:
    """A :class:`ResolvedPrefix` of a prefix or soft prompt, for a model with ``num_layers`` attention layers."""
    tokens, parameters = prefix.num_virtual_tokens, prefix.parameters
    if isinstance(prefix, SoftPrompt):
        through = "" if prefix.encoder is None else f" through an {prefix.encoder.kind.upper()}"
        place = prefix.config.place
        return ResolvedPrefix(f"soft prompt{through}", tokens, tokens, parameters, prompt=prefix, place=place)

    def key_values() -> KeyValues:
        found: KeyValues = [None] * num_layers
        if prefix.encoder is not None:
            prefix.encoder.share()
        for index, kv in zip(prefix.layer_indices, prefix.read(), strict=True):
            found[index] = kv
        if prefix.encoder is not None:
            prefix.encoder.unshare()
        return found

    layers = len(prefix.layer_indices)
    return ResolvedPrefix(prefix.kind, tokens, prefix.offset, parameters, key_values, None, layers, prefix.is_added)
