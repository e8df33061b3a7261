"""Runs a model's own forward once, as its user will, so that ``attach`` already refuses what cannot work."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from fastprefix.errors import fail
from fastprefix.hf.adapters.installation import Installation
from fastprefix.hf.attention.recording import AttentionCall, recording
from fastprefix.hf.model import probing
from fastprefix.hf.model.dummy_inputs import dummy_inputs
from fastprefix.hf.model.encoder_decoder import is_encoder_decoder
from fastprefix.hf.model.next_token_loss import IGNORED
from fastprefix.machine.process_wide import ProcessWide
from fastprefix.prefixes.prompt import Place


def run_once(installation: Installation) -> list[AttentionCall]:
    """Run the outermost model on a few tokens with the active prefix, once without a mask and once with one.

    Warnings are not shown here, but in the user's own first forward.

    Returns:
        The attention calls of its layers.

    Raises:
        ValueError: the forward fails with a prefix but not without; the model's class and the error are named.
    """
    model, active = installation.model, installation.selection.active
    calls: list[AttentionCall] = []
    selection = installation.selection
    labelled = bool(installation.head) and selection.has_prompts()
    for inputs in _calls(model, labelled, selection.inner_place()):
        with installation.warn.forgotten(), recording() as found:
            error = _error(model, inputs)
        if error is None:
            calls += found
            continue
        installation.activate(None)
        bare = _error(model, inputs)
        installation.activate(active)
        if bare is None:
            got = f"{type(model).__name__}, whose forward of {' and '.join(inputs)} fails with a prefix ({error})"
            raise fail("model", got, "a model that runs with one on what it runs on without") from error
    # The user's own first forward checks again that every layer reads the prefix, as the model may change until then.
    for hooks in installation.hooks:
        hooks.check_again()
    return calls


@ProcessWide
@contextmanager
def _silent() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _error(model: Any, inputs: dict[str, Any]) -> Exception | None:
    """The exception that a forward raises; None if it runs."""
    try:
        with _silent(), probing.evaluating(model):
            model(**inputs)
    except Exception as error:  # any kind: run_once reports it, unless the bare model fails too
        return error
    return None


def _calls(model: Any, labelled: bool, place: Place | None) -> list[dict[str, Any]]:
    """Keyword arguments of the forwards to try: bare, with a mask, and (``labelled``) with labels.

    ``place``: of a prompt inside the text. At its marker there is one; after the text, labels or a cache are needed.
    """
    arguments = inspect.signature(model.forward).parameters
    inputs: dict[str, Any] = dummy_inputs(model.get_encoder() if is_encoder_decoder(model) else model)
    if is_encoder_decoder(model):
        inputs["decoder_input_ids"] = torch.ones(1, 2, dtype=torch.long, device=next(iter(inputs.values())).device)
    if "use_cache" in arguments and place != "after":
        inputs["use_cache"] = False
    labels = inputs.get("input_ids")
    if place is not None and labels is not None:
        labels = labels.clone()
        labels[:, 0] = IGNORED if place == "after" else labels[:, 0]
        if place != "after":
            inputs["input_ids"] = labels.masked_fill(
                torch.arange(labels.shape[1], device=labels.device) == 0, int(place)
            )
    calls = [inputs]
    if "input_ids" in inputs and "attention_mask" in arguments:
        calls.append({**inputs, "attention_mask": torch.ones_like(inputs["input_ids"])})
    if labelled and "labels" in arguments:
        calls.append({**calls[-1], "labels": labels})
    return calls
