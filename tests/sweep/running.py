"""A class with something attached, its results and gradients, beside those of explicit concatenation."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fastprefix
from fastprefix.hf.adapters.lookup import require_installation
from tests.support.concat_oracle import run_concat
from tests.sweep.models.build import as_built
from tests.sweep.models.inputs import Case
from tests.sweep.outcome import ORACLE, RAISED, REFUSED, UNTRUE, Outcome, compare, line, tensors

# What a refusal reads like.
_REFUSAL = re.compile(r"[\w.]+: got .*, expected ", re.DOTALL)


class Refused(Exception):
    """What ``attach`` said no with."""


def attached(bare: Any, config: Any) -> tuple[Any, Any]:
    """A copy of a bare model and what is attached to it, in fp64; raises Refused."""
    model = as_built(bare)
    try:
        prefix = fastprefix.attach(model, config)
    except ValueError as error:
        said = " ".join(str(error).split())
        if not _REFUSAL.match(said):  # the model's own, let through
            raise
        raise Refused(said) from error
    return model, prefix.to(torch.float64)


def refused(bare: Any, refusal: object) -> Outcome:
    """A refusal, and whether what it says of the bare model's inputs is so."""
    ids = torch.ones(1, 2, dtype=torch.long)
    inputs: dict[str, Tensor] = {}
    if "does not run on input_ids alone" in str(refusal):
        inputs = {"input_ids": ids}
    elif "does not run on inputs_embeds alone" in str(refusal):
        # Not those of tokens, which some models find the ids of.
        inputs = {"inputs_embeds": torch.randn_like(bare.get_input_embeddings()(ids))}
    if inputs:
        try:
            with torch.no_grad():
                bare(**inputs)
        except Exception:
            return Outcome(REFUSED, str(refusal))
        return Outcome(UNTRUE, str(refusal))
    return Outcome(REFUSED, str(refusal))


def run(model: Any, case: Case, **more: Any) -> dict[str, Tensor]:
    """The results of a forward, those of padding left out."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        output = tensors(model(**case.inputs, **more))
    return only_real(output, case)


def only_real(output: dict[str, Tensor], case: Case) -> dict[str, Tensor]:
    """Without those of padding."""
    if case.real is None:
        return output
    # GPT-2's second head reads the last place, which is padding here.
    kept = {k: x for k, x in output.items() if k != "mc_logits"}
    return {k: x[case.real] if x.shape[:2] == case.real.shape else x for k, x in kept.items()}


def judged(got: Callable[[], Any], want: Callable[[], Any]) -> Outcome:
    """The library's numbers beside the oracle's; who raises is told apart."""
    try:
        expected = want()
    except Exception as error:
        return Outcome(ORACLE, line(error))
    try:
        found = got()
    except Exception as error:
        return Outcome(RAISED, line(error))
    return compare(found, expected)


def pairs_by_name(model: Any, made: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """The prefix's keys and values by the name of their attention module."""
    names = {id(m): n for n, m in model.named_modules()}
    modules = require_installation(model).facts.layers.modules
    return {names[id(modules[i])]: kv for i, kv in zip(made.layer_indices, made.key_values(), strict=True)}


class Concatenating:
    """Called like a model."""

    def __init__(self, model: Any, pairs: dict[str, tuple[Tensor, Tensor]]) -> None:
        self.model, self.pairs = model, pairs

    def __call__(self, **inputs: Any) -> Any:
        return run_concat(self.model, self.pairs, **inputs)


def with_gradients(output: dict[str, Tensor], leaves: list[Tensor]) -> dict[str, Tensor]:
    """The results, and the gradients of a sum in which every number has a weight of its own."""
    total = torch.zeros(())
    for x in output.values():
        if x.requires_grad and torch.isfinite(x).all():
            total = total + (x * torch.sin(torch.arange(x.numel(), dtype=x.dtype)).view(x.shape)).sum()
    if not total.requires_grad:
        raise ValueError("no result depends on the prefix")
    grads = torch.autograd.grad(total, leaves, allow_unused=True)
    found = {k: x.detach() for k, x in output.items()}
    for i, (grad, leaf) in enumerate(zip(grads, leaves)):
        found[f"gradient {i}"] = torch.zeros_like(leaf) if grad is None else grad
    return found
