"""Has the backends verified, on a model's devices, for the calls that its attention layers make."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack

from fastprefix import functional
from fastprefix.hf.adapters.installation import Installation
from fastprefix.hf.attention.recording import AttentionCall
from fastprefix.hf.model import probing
from fastprefix.hf.model.layers import AttentionStack
from fastprefix.verification import first_use, store
from fastprefix.verification.cells import signature


def verify_calls(calls: Iterable[AttentionCall]) -> None:
    """Verify what training and generating need whose layers make these calls, unless that is known or switched off."""
    if store.policy() is not store.Policy.FIRST_USE or functional.default_backend("auto") != "auto":
        return
    found = (functional.to_args(**call.tensors, **call.options) for call in calls)
    first_use.verify_model(list({signature(args, "forward"): args for args in found}.values()))


def attention_calls(installation: Installation) -> list[AttentionCall]:
    """The attention calls of a model's layers in a forward of two tokens, without a soft prompt's earlier calls.

    Raises:
        ValueError: the model's forward needs more than tokens.
    """
    with ExitStack() as stack:
        for hooks in installation.hooks:
            stack.enter_context(hooks.unchecked())
        return [call for each in installation.facts.layers.stacks for call in _rows(each)]


def _rows(stack: AttentionStack) -> list[AttentionCall]:
    backwards = probing.run(stack.owner, stack.dummy_inputs())[::-1]
    return probing.first_calls(backwards)[: len(stack.layers)][::-1]
