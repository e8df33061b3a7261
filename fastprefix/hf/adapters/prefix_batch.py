"""``prefix_batch``: selects a prefix for each row of a batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from fastprefix.errors import fail
from fastprefix.hf.adapters.attached_prefixes import AttachedPrefixes, parts
from fastprefix.hf.adapters.lookup import require_installation
from fastprefix.hf.runtime.forward_context import AdapterSelection


@contextmanager
def prefix_batch(model: Any, names: Sequence[str | tuple[str, ...] | None]) -> Iterator[None]:
    """Let row i of every batch inside the block read the prefix ``names[i]``, or none: forward, training, ``generate``.

    The prefixes in use are stored once, one after the other, whatever their lengths: none is padded to the longest,
    and none is copied for a row. A row's positions start after its own prefix. Prefixes and soft prompts may be mixed
    (where a soft prompt need not be concatenated), and every trained one gets its gradient. Under ``generate``, beams
    and ``num_return_sequences`` of a row read the row's prefix. The block applies to the thread that opened it: until
    it exits, another thread's forward of the model raises RuntimeError, and another thread's block ValueError.

    A tuple of names is several prefixes behind each other for one row, in this order, as
    :func:`fastprefix.init.concat` would make them. Soft prompts behind each other are one prompt. What a prefix adds in
    memory is once for each tuple that it is in, not for each row.

    Args:
        model: with the prefixes attached (or kept on disk, see :func:`register`), or a patched PEFT model.
        names: one for each row, attached names or (under ``patch``) PEFT's adapters; None for the bare model. Tuples
            are for attached and registered prefixes.

    Raises:
        ValueError: a name is unknown, there are none, a batch's rows are not a multiple of the names, or a tuple mixes
            soft prompts with prefixes or has two prefixes with a trained copy of the same module.
    """
    installation = require_installation(model)
    if isinstance(names, str) or not isinstance(names, Sequence) or not names:
        raise fail("names", repr(names), "a list of names, one for each row of the batch")
    known = installation.selection.provider.names()
    tuples = isinstance(installation.selection.provider, AttachedPrefixes)
    for name in names:
        several = tuples and isinstance(name, tuple) and bool(name)
        for part in parts(name) if several else (name,):
            if (part is not None and part not in known) or (several and part is None):
                raise fail("names", repr(name), f"None or one of {sorted(known)}{', or a tuple of these' * tuples}")
    if installation.selection.shared is not None:
        raise fail("names", "a mixed batch inside shared_prompt", "neither block inside the other")
    selected = AdapterSelection(tuple(names))
    with installation.lock.block(), installation.selection.choosing(selected), installation.configs.switched_on():
        yield
