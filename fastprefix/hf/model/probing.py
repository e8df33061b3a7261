"""Runs a model, or a part of it, on a few tokens and records its layers' calls of the attention function."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastprefix.errors import fail
from fastprefix.hf.attention import method_overrides
from fastprefix.hf.attention.recording import AttentionCall, recording
from fastprefix.hf.model import offload, wrappers
from fastprefix.machine.process_wide import ProcessWide
from fastprefix.verification import first_use


@ProcessWide
@contextmanager
def _uncompiled() -> Iterator[None]:
    with torch.compiler.set_stance("force_eager"):
        yield


def check_model(model: Any) -> None:
    """Raise unless ``model`` is a transformers model of a kind that can carry a prefix."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise fail("model", type(model).__name__, f"a transformers PreTrainedModel{wrappers.hint(model)}")
    name = type(model).__name__
    if absent := offload.meta_parameters(model):
        got = f"{name} with parameters on the meta device ({absent[0]})"
        raise fail("model", got, "a model with its weights in memory, or where a hook of accelerate's finds them")
    if not model._can_set_attn_implementation() and not method_overrides.find_overrides(model):
        raise does_not_dispatch(model)


def does_not_dispatch(model: nn.Module, detail: str = "") -> ValueError:
    """The error for a model that bypasses transformers' attention interface, naming its class."""
    return fail(
        "model",
        f"{type(model).__name__}, whose attention does not go through transformers' attention interface{detail}",
        "a model whose every attention layer does: elsewhere a prefix would be silently ignored",
    )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside the block, without gradients and with compiled modules (``module.compile()``) run eagerly.

    Backends are not verified for the few tokens here; what the model needs is verified at once, after them.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad(), _uncompiled(), first_use.held(quiet=True):
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def run(model: nn.Module, inputs: dict[str, Tensor]) -> list[AttentionCall]:
    """All attention calls in a forward of these inputs, in eval mode without gradients."""
    options = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    with evaluating(model), recording() as calls:
        model(**inputs, **options)
    return calls


def run_part(model: nn.Module, part: nn.Module, inputs: dict[str, Tensor]) -> list[AttentionCall]:
    """All attention calls in a forward of a model's part.

    Raises:
        ValueError: there are none, or the part does not run on these inputs; the model's class is named.
    """
    try:
        calls = run(part, inputs)
    except KeyError as error:  # from models with a table of attention classes by implementation name
        raise does_not_dispatch(model, f" ({error})") from error
    except (AttributeError, IndexError, RuntimeError, TypeError) as error:
        got = f"{type(model).__name__}, which does not run on {' and '.join(inputs)} alone ({error})"
        raise fail("model", got, "a model that does, or the part of it that is to read the prefix") from error
    if not calls:
        raise does_not_dispatch(model)
    return calls


def first_calls(calls: Sequence[AttentionCall]) -> list[AttentionCall]:
    """The first call of each module."""
    found: dict[int, AttentionCall] = {}
    for call in calls:
        found.setdefault(id(call.module), call)
    return list(found.values())
