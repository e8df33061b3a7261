"""What one prefix costs on this machine: bytes, seconds of a forward, and seconds of new tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import fastprefix
from fastprefix.hf.adapters.lookup import require_installation
from fastprefix.hf.model import probing
from fastprefix.machine import device
from fastprefix.machine.timing import Timing, interleaved, ratio
from fastprefix.measure.training.saved_bytes import saved_bytes
from fastprefix.prefixes.prefix import Prefix

WITH, WITHOUT = "with the prefix", "without"
_ROUNDS, _NEW_ROUNDS, _NEW_TOKENS = 5, 3, 8


@dataclass(frozen=True)
class Costs:
    """What was measured in turns, with the prefix and without."""

    where: str
    rows: int  # B of the batch
    length: int  # S, with padding
    forward: dict[str, Timing]
    new_tokens: dict[str, Timing]  # of some new tokens after the first text's prompt
    saved_bytes: int  # that a forward with a loss keeps for the backward of the prefix, parameters not counted
    shared_bytes: int  # keys and values of the prefix in the model's dtype, once for all rows

    def lines(self) -> list[list[str]]:
        """A table of it in words."""
        found = []
        for what, timings in (
            (f"a forward of {self.rows} x {self.length} tokens", self.forward),
            (f"{_NEW_TOKENS} new tokens after a prompt", self.new_tokens),
        ):
            first, second = (f"{timings[key].median * 1e3:,.0f} ms" for key in (WITH, WITHOUT))
            found.append([what, first, second, str(ratio(timings, WITH, WITHOUT))])
        return found


def measure(model: Any, name: str, batch: Mapping[str, Tensor], prompt: Tensor) -> Costs:
    """Time forwards of a batch and new tokens after a prompt ``[L]``, in turns with a prefix and without."""
    forwards = {key: _forward(model, chosen, batch) for key, chosen in ((WITH, name), (WITHOUT, None))}
    generates = {key: _generate(model, chosen, prompt) for key, chosen in ((WITH, name), (WITHOUT, None))}
    with _active_afterwards(model, name):
        with probing.evaluating(model):
            times = interleaved(forwards, _ROUNDS, 1, model.device)
            new = interleaved(generates, _NEW_ROUNDS, 1, model.device)
        fastprefix.set_prefix(model, name)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        labels[:, 0] = -100  # given, for prompts that stand where the labels begin
        kept = saved_bytes(lambda: model(**batch, labels=labels, use_cache=False).loss, model.parameters())
    where = f"{device.name(model.device)}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    rows, length = batch["input_ids"].shape
    return Costs(where, rows, length, times, new, kept, shared_bytes(model, name))


def shared_bytes(model: Any, name: str) -> int:
    """Bytes of a prefix's keys and values in the model's dtype, which all rows read."""
    installation = require_installation(model)
    prefix = installation.selection.named(name)
    shapes = prefix.shapes if isinstance(prefix, Prefix) else installation.facts.layers.shapes
    return prefix.num_virtual_tokens * sum(shape.numel for shape in shapes) * model.dtype.itemsize


def _forward(model: Any, name: str | None, batch: Mapping[str, Tensor]) -> Callable[[], Any]:
    def run() -> Any:
        fastprefix.set_prefix(model, name)
        return model(**batch)

    return run


def _generate(model: Any, name: str | None, prompt: Tensor) -> Callable[[], Any]:
    ids = prompt[None].to(model.device)
    options = {"min_new_tokens": _NEW_TOKENS, "max_new_tokens": _NEW_TOKENS, "max_length": None, "do_sample": False}

    def run() -> Any:
        fastprefix.set_prefix(model, name)
        return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **options)

    return run


@contextmanager
def _active_afterwards(model: Any, name: str) -> Iterator[None]:
    try:
        yield
    finally:
        fastprefix.set_prefix(model, name)
