"""The whole text as a frozen prefix: what a cartridge is to be as good as.

The model reads the text once, and its keys and values are attached as a prefix of T tokens. Rows after it then compute
what they would compute after the text itself, for the cost of the rows.

A cartridge of P tokens is shorter than its text, and content after a prefix begins at position P, in PEFT too. So that
content sees the text's keys from the same distance after either, the text is read at the positions ``P - T .. P - 1``,
and content after all of it begins at P as well. Attention with rotary positions depends on distances alone, so that
this computes the same as positions ``0 .. T - 1``. Where positions are absolute, the text stands at ``0 .. T - 1``, and
the content at P.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fastprefix.errors import fail
from fastprefix.hf.adapters.attach import attach_prefix
from fastprefix.hf.adapters.build import build_prefix
from fastprefix.hf.adapters.installation import Installation
from fastprefix.hf.adapters.lookup import find_installation
from fastprefix.hf.api import detach, set_prefix
from fastprefix.hf.model import offload, probing
from fastprefix.prefixes import init
from fastprefix.prefixes.config import PrefixConfig
from fastprefix.prefixes.prefix import Prefix

TEXT = "whole_text"  # the name under which it is attached
_PROBED = 4  # tokens with which it is seen whether positions are relative


class TextPrefix(Prefix):
    """A whole text's keys and values, after which content begins where it begins after a cartridge."""

    start = 0

    @property
    def offset(self) -> int:
        """Position of the content."""
        return self.start


@contextmanager
def reading(model: Any, ids: Sequence[int], tokens: int, name: str = TEXT) -> Iterator[TextPrefix]:
    """Attach a text as a frozen prefix inside the block, active; afterwards the model is as it was.

    Args:
        model: a causal model of transformers.
        ids: the text's T token ids.
        tokens: P of the cartridge: the position at which content begins.
        name: a name that no attached prefix has.

    Raises:
        ValueError: an argument does not fit, the model cannot carry a prefix, or a layer sees fewer tokens than the
            text has.
    """
    installed = find_installation(model)
    before = None if installed is None else installed.selection.active
    text = attach_prefix(model, name, lambda installation: _read(installation, ids, tokens))
    assert isinstance(text, TextPrefix)
    try:
        yield text
    finally:
        detach(model, name)
        if before is not None:
            set_prefix(model, before)


def _read(installation: Installation, ids: Sequence[int], tokens: int) -> TextPrefix:
    check_text(installation, ids, tokens)
    keys, values = key_values(installation, torch.tensor(list(ids)), tokens)
    prefix = build_prefix(installation, PrefixConfig(init=init.kv(keys, values)))
    prefix.__class__ = TextPrefix
    assert isinstance(prefix, TextPrefix)
    prefix.start = tokens
    prefix.requires_grad_(False)
    return prefix


def check_text(installation: Installation, ids: Sequence[int], tokens: int) -> None:
    """Raise ValueError unless a text's keys and values can stand for it in this model."""
    layers, name = installation.facts.layers, type(installation.model).__name__
    if len(layers.stacks) > 1 or not layers.main.causal or layers.main.main_input != "input_ids":
        raise fail("model", name, "a causal language model, without an encoder")
    if layers.hybrid_layer_types or layers.reuses_modules:
        got = f"{name}, whose layers carry a state past the text, or run one module as several"
        raise fail("model", got, "a model that remembers a text by keys and values of each layer alone")
    if not 1 <= tokens <= len(ids):
        raise fail("tokens", tokens, f"1 to {len(ids)}, the tokens of the text")
    if layers.window is not None and layers.window < len(ids):
        got = f"{len(ids)} tokens for layers with a window of {layers.window}"
        raise fail("text", got, "a text that every layer can see all of: a prefix is seen from anywhere")


def key_values(installation: Installation, ids: Tensor, tokens: int) -> tuple[list[Tensor], list[Tensor]]:
    """Keys ``[H_kv, T, D]`` and values of each layer, of a text that ends before position ``tokens``."""
    main = installation.facts.layers.main
    active = installation.selection.active
    installation.activate(None)
    installation.configs.switch(on=True)
    try:
        with installation.forward.bypass():
            first = tokens - len(ids) if _relative(main, ids) else 0
            return _run(main, ids, first, installation.facts.layers.modules)
    finally:
        installation.activate(active)


def _relative(main: Any, ids: Tensor) -> bool:
    """Whether a text computes the same at other positions, as with rotary ones."""
    if not main.takes_positions:
        return False
    some = ids[:_PROBED]
    here, there = (probing.run(main.owner, _inputs(main, some, first)) for first in (0, 1))
    # Rotary tables are made in fp32, also in an fp64 model, and bf16 rounds to 0.4%.
    tiny = min(0.05, max(1e-3, 8 * torch.finfo(here[-1].tensors["v"].dtype).eps))
    pairs = [(a.tensors["v"], b.tensors["v"]) for a, b in zip(here, there, strict=True)]
    return all(bool((a - b).abs().max() <= tiny * a.abs().max()) for a, b in pairs)


def _inputs(main: Any, ids: Tensor, first: int) -> dict[str, Tensor]:
    row = ids[None].to(offload.device(main.owner))
    if not main.takes_positions:
        return {"input_ids": row}
    return {"input_ids": row, "position_ids": torch.arange(first, first + len(ids), device=row.device)[None]}


def _run(main: Any, ids: Tensor, first: int, modules: Sequence[Any]) -> tuple[list[Tensor], list[Tensor]]:
    calls = {id(call.module): call.tensors for call in probing.run(main.owner, _inputs(main, ids, first))}
    found = [calls[id(module)] for module in modules]
    return [x["k"][0].clone() for x in found], [x["v"][0].clone() for x in found]
