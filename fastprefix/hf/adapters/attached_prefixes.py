"""Names of what :func:`fastprefix.attach` attached, or :func:`fastprefix.register` keeps on disk."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

from torch import nn

from fastprefix.hf.runtime.prefix_reader import Choice, Entry, Name
from fastprefix.hf.runtime.prompt_prefill import KeyValues
from fastprefix.prefixes.prefix import LayerKV, Prefix
from fastprefix.prefixes.prompt import SoftPrompt
from fastprefix.validation import fail

if TYPE_CHECKING:
    from fastprefix.hf.adapters.installation import Installation
    from fastprefix.hf.storage.registry import Shelf


class Attached:
    """The source of an attached model."""

    beside = False

    def __init__(self, state: Installation) -> None:
        self.state = state
        self.shelf: Shelf | None = None

    def names(self) -> list[str]:
        """Attached ones, then those on disk."""
        return [*self.state.prefixes, *(self.shelf.paths if self.shelf is not None else ())]

    def resident(self) -> list[str]:
        """Those in memory."""
        return [*self.state.prefixes, *(self.shelf.resident if self.shelf is not None else ())]

    def enabled(self) -> bool:
        """Always."""
        return True

    def active(self) -> Choice | None:
        """The one that every row reads."""
        return None if self.state.active is None else Choice((self.state.active,))

    def entry(self, name: Name) -> Entry:
        """What a name leads to; raises ValueError when it leads nowhere."""
        return entry(self.prefix(name), len(self.state.slots))

    def prefix(self, name: Name) -> Prefix | SoftPrompt:
        """What is attached under a name, or read from disk; raises ValueError where there is none."""
        prefix = self.state.prefixes.get(name) if isinstance(name, str) else None
        if prefix is None:
            if self.shelf is None or name not in self.shelf.paths:
                raise fail("names", repr(name), f"None or one of {sorted(self.names())}")
            prefix = self.shelf.take(str(name))
        return prefix

    def modules(self, name: Name | None) -> dict[str, nn.Module]:
        """A prefix's own copies of modules of the model."""
        return {} if name is None else self.prefix(name).modules_to_save.named()

    @contextmanager
    def held(self, choice: Choice) -> Iterator[None]:
        """Keep what lies on disk in memory for a block, and let every row use its own prefix's modules."""
        with nullcontext() if self.shelf is None else self.shelf.held(choice.distinct()):
            modules = {name: self.modules(name) for name in dict.fromkeys(choice.names)}
            with self.state.modules.rows(choice, modules):
                yield


def entry(prefix: Prefix | SoftPrompt, num_layers: int) -> Entry:
    """What a prefix or soft prompt gives a model of so many attention layers."""
    tokens, parameters = prefix.num_virtual_tokens, tuple(prefix.parameters())
    if isinstance(prefix, SoftPrompt):
        return Entry("soft prompt", tokens, tokens, parameters, prompt=prefix)

    def key_values() -> KeyValues:
        found: KeyValues = [None] * num_layers
        if prefix.encoder is not None:
            prefix.encoder.share()
        for index, kv in zip(prefix.layer_indices, prefix.key_values(), strict=True):
            found[index] = LayerKV(*kv)
        if prefix.encoder is not None:
            prefix.encoder.unshare()
        return found

    kind = "prefix" if prefix.encoder is None else "prefix through an MLP"
    return Entry(kind, tokens, prefix.offset, parameters, key_values, layers=len(prefix.layer_indices))
