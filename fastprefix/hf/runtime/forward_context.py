"""``ForwardContext``, the prefixes that one forward reads, and the records that resolve a prefix's name."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from fastprefix.errors import fail
from fastprefix.hf.attention.packed_prompts import PackedPrompts
from fastprefix.prefixes.prefix import LayerKV
from fastprefix.prefixes.prompt import Place

Name = Hashable  # of a prefix; several behind each other are a tuple of names, PEFT's multitask prompts (name, task)
KeyValues = list[LayerKV | None]  # one for every attention layer


class AdapterSelection(NamedTuple):
    """Which prefixes a batch reads: one name for all rows, or one for each row (None: the bare model)."""

    names: tuple[Name | None, ...]

    def distinct(self) -> list[Name]:
        """The distinct names other than None, in order of first appearance."""
        return list(dict.fromkeys(name for name in self.names if name is not None))

    def rows(self, batch: int) -> list[Name | None]:
        """A name for each row of a batch; beams and returned sequences of a row are neighbours.

        Raises:
            ValueError: the batch is not a multiple of the names.
        """
        if batch % len(self.names):
            expected = f"one for each of the batch's {batch} rows"
            raise fail("names", f"{len(self.names)} names", expected)
        return [name for name in self.names for _ in range(batch // len(self.names))]


class ResolvedPrefix(NamedTuple):
    """One prefix (``key_values``) or soft prompt (``prompt``) that a :class:`PrefixProvider` found for a name."""

    kind: str  # in words, for messages
    tokens: int  # P
    offset: int  # number of positions by which the content after the prefix is shifted
    parameters: Callable[[], Iterable[Tensor]]  # that the prefix is computed from
    key_values: Callable[[], KeyValues] | None = None
    prompt: Callable[[], Tensor] | None = None  # [P, d]
    layers: int | None = None  # how many layers have a prefix
    added: bool = False  # whether its output is added to the content's, instead of one softmax over both
    place: Place = "before"  # of a soft prompt in a row's text


class PrefixProvider(Protocol):
    """Resolves names to prefixes: attached prefixes, PEFT's adapters, or PEFT's gated prompts."""

    gated: bool  # whether prompts are added through a gate, and the content keeps the model's own attention

    def names(self) -> list[str]:
        """Every name that can be selected."""
        ...

    def resident(self) -> list[str]:
        """The names whose parameters are in memory."""
        ...

    def active(self) -> AdapterSelection | None:
        """The selection for every row outside of a ``prefix_batch`` block; None for the bare model."""
        ...

    def enabled(self) -> bool:
        """False while adapters are disabled, and a block's selection is not read either."""
        ...

    def resolve(self, name: Name) -> ResolvedPrefix:
        """The prefix of a name; raises ValueError where there is none."""
        ...

    def held(self, selection: AdapterSelection) -> AbstractContextManager[None]:
        """Keep the selected prefixes in memory inside the block, and their trained modules in the model."""
        ...


@dataclass
class PrefixBank:
    """Several prefixes packed layer by layer, from which each row of a batch reads one."""

    names: list[Name]
    offsets: list[int]
    layers: KeyValues  # packed: [H_kv, sum of P, D] with lens [N]; of a single prefix without lens
    last: list[Tensor | None]  # [d], hidden state of each prompt's last token


@dataclass
class InsertedPlaces:
    """Where a prompt stands in each of a batch's rows; stored with the cache that holds the rows."""

    last: Tensor  # [B], the column of the text at which the state of the prompt's last token is returned
    start: Tensor  # [B], the column of the text at which the prompt begins
    extra: int  # how many tokens a row has more than its text


@dataclass
class Insertion:
    """A soft prompt that runs inside every row of a forward, at a place of its own in each."""

    place: Place
    prompt: Tensor  # [B or 1, P, d]
    labels: Tensor | None  # [B, S], the forward's
    places: InsertedPlaces | None = None  # found when the prompt is inserted; None in a row that goes on from a cache


@dataclass
class ForwardContext:
    """Everything that one forward reads besides its content: made before the layers run, dropped afterwards."""

    offset: int | Tensor = 0  # number of positions by which content is shifted; [B, 1]
    layers: KeyValues | None = None  # None: every layer reads the active prefix
    last: Tensor | None = None  # [B or 1, d], hidden state of the last token of each row's prompt
    concatenated: Tensor | None = None  # [B or 1, P, d], embeddings to concatenate instead
    concatenated_ids: Tensor | None = None  # [B or 1, P], their ids, where they are tokens
    concatenated_mask: Tensor | None = None  # [B or 1, P]
    concatenated_from: int = 0  # position of the first concatenated embedding
    inserted: Insertion | None = None  # the prompt that runs inside every row
    places: Tensor | None = None  # [B, P + S], where each row's tokens are from, if its prompt is behind its padding
    encoded: int = 0  # in a decoder that reads an encoder's states: how many of them are a soft prompt's
    packed: PackedPrompts | None = None  # where the prompts and rows are that run as one text
    gated: bool = False  # the model's own attention, masks and positions stay; a gated prompt is added
    padding: Tensor | None = None  # [B], padding places before a row's first token
    leaves: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # see checkpointing.Bridge

    def tensors(self) -> list[Tensor]:
        """Keys, values, gates and biases that require a gradient."""
        given = [kv for kv in self.layers or () if kv is not None]
        return [x for kv in given for x in (kv.k, kv.v, kv.gate, kv.bias) if x is not None and x.requires_grad]


class NestedForward:
    """A forward over prompts that runs inside a forward over rows."""

    def __init__(self, context: ForwardContext | None, outermost: bool) -> None:
        self.context = context  # the prefix that the prompts themselves read
        self.outermost = outermost  # whether the prompts run through the whole model, as a caller's rows do
        self.hidden: Tensor | None = None  # [N, P, d]


class ForwardState:
    """State of the forward that one model runs now. The model's ForwardLock keeps other threads away from it."""

    def __init__(self) -> None:
        self.context: ForwardContext | None = None
        self.nested: NestedForward | None = None
        self.prepared: PrefixBank | None = None  # computed in advance, for the next forward
        self.labels: Tensor | None = None  # [B, S], of a forward with a prompt inside its rows
        self.bypassed = False  # whether the model runs as if nothing were attached
        self.encoded = False  # whether an encoder has run with a soft prompt, and its decoder has not yet
        self.states: weakref.ref[Tensor] | None = None  # an encoder's, with a soft prompt's, that its decoder has read

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the model that is made during a forward is not itself in a forward.
        return {**self.__dict__, "context": None, "nested": None, "prepared": None, "labels": None, "states": None}

    def knows(self, states: Tensor) -> bool:
        """Whether a decoder may read an encoder's states as those of a soft prompt and the row, without a mask.

        They may be if the encoder has run since the decoder did, or the decoder has read them before, as in a
        generation's later steps.
        """
        known = self.encoded or (self.states is not None and self.states() is states)
        self.encoded, self.states = False, weakref.ref(states)
        return known

    @contextmanager
    def bypass(self) -> Iterator[None]:
        """Run the model inside the block as if nothing were attached."""
        self.bypassed = True
        try:
            yield
        finally:
            self.bypassed = False

    @contextmanager
    def preparing(self, bank: PrefixBank) -> Iterator[None]:
        """Let the forward inside the block read this precomputed bank."""
        self.prepared = bank
        try:
            yield
        finally:
            self.prepared = None
