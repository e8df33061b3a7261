"""Everything that a report shows of one adapter, as data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import fastprefix
from fastprefix import analysis
from fastprefix.hf.adapters.lookup import require_installation
from fastprefix.inspection import costs
from fastprefix.inspection.texts import Texts
from fastprefix.models import complete
from fastprefix.prefixes import slots
from fastprefix.prefixes.memory import PrefixMemoryConfig

NEAREST = 4  # tokens of the vocabulary for each slot


@dataclass(frozen=True)
class Size:
    """What is trained, and how large it is."""

    kind: str  # in words
    tokens: int  # P
    layers: str  # where
    trained: int  # parameters
    total: int  # of the model
    file_bytes: int | None  # of the adapter's folder


@dataclass(frozen=True)
class Inspection:
    """What one adapter is and does. Parts that a kind of adapter has none of are None, with a reason in ``notes``."""

    adapter: str
    model: str
    size: Size
    texts: Texts
    mass: analysis.PrefixMass | None
    bias: analysis.BiasDecomposition | None
    slots: analysis.SlotMass | None
    geometry: analysis.SlotGeometry | None
    complaints: dict[str, str]
    nearest: analysis.Nearest | None
    place: analysis.PromptPlace | None
    map: analysis.SlotMap | None
    generations: tuple[tuple[str, str, str], ...]  # prompt, without the prefix, with it
    costs: costs.Costs
    notes: tuple[str, ...]


def gather(
    model: Any,
    tokenizer: Any,
    texts: Texts,
    *,
    adapter: str,
    about: str,
    name: str = "default",
    start: Any = None,
    max_new_tokens: int = 32,
    file_bytes: int | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> Inspection:
    """Inspect the prefix that is attached to a causal language model under ``name``.

    Args:
        model: with the prefix attached.
        tokenizer: the model's.
        texts: what the model reads.
        adapter: what the adapter is called in the report; ``about``: the model likewise.
        name: of the prefix. It is active afterwards.
        start: the prefix where training started, as a module; None where it is not known.
        max_new_tokens: most new tokens of a generation.
        file_bytes: size of the adapter's files, for the report.
        progress: called with a line before each part.
    """
    installation = require_installation(model)
    fastprefix.set_prefix(model, name)
    prefix = installation.selection.named(name)
    resolved = installation.selection.provider.resolve(name)
    notes: list[str] = []
    parts: dict[str, Any] = dict.fromkeys(("mass", "bias", "slots", "geometry", "nearest", "place", "map"))
    batch = {key: x.to(model.device) for key, x in texts.batch.items()}
    progress("attention")
    if resolved.added:
        notes.append(
            f"A {resolved.kind} is added to the output of attention over the content. It has no share of one softmax, "
            "so that there is no mass on it."
        )
    elif resolved.place != "before":
        notes.append("The soft prompt runs inside every row: to attention it is content, and there is no mass on it.")
    else:
        parts["mass"] = analysis.prefix_mass(model, batch, name)
        parts["bias"] = analysis.bias_decomposition(model, batch, name)
        parts["slots"] = analysis.slot_mass(model, batch, name)
    progress("slots")
    if not isinstance(prefix.config, PrefixMemoryConfig):
        parts["geometry"] = analysis.slot_geometry(model, name)
    if not resolved.added:
        parts["nearest"] = analysis.nearest(model, name, NEAREST, tokenizer)
        parts["map"] = analysis.slot_map(model, batch, name, start)
        if resolved.prompt is not None:
            parts["place"] = analysis.prompt_place(model, name, start, tokenizer)
    if start is None and parts["map"] is not None:
        notes.append("Where training started is not known: an adapter saved before training can be given as --start.")
    progress("generations")
    said = []
    for prompt in texts.prompts:
        answers = []
        for chosen in (None, name):
            fastprefix.set_prefix(model, chosen)
            answers.append(complete(model, tokenizer, prompt, max_new_tokens))
        said.append((tokenizer.decode(prompt, skip_special_tokens=True), *answers))
    progress("memory and speed")
    measured = costs.measure(model, name, batch, texts.prompts[0])
    where = "input embeddings" if resolved.layers is None else f"{resolved.layers} of {len(installation.slots)} layers"
    own = list(resolved.parameters())
    mine = {id(p) for p in own}
    total = sum(p.numel() for p in model.parameters() if id(p) not in mine)
    size = Size(resolved.kind, resolved.tokens, where, sum(p.numel() for p in own), total, file_bytes)
    complaints = {} if parts["geometry"] is None else slots.complaints(prefix)
    return Inspection(
        adapter,
        about,
        size,
        texts,
        complaints=complaints,
        generations=tuple(said),
        costs=measured,
        notes=tuple(notes),
        **parts,
    )
