"""``attach`` of a class, with a prefix and with a soft prompt: right, refused at once, or red."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastprefix import PrefixConfig, PromptConfig, init
from tests.sweep import oracles, positions
from tests.sweep.build import as_built
from tests.sweep.inputs import Case
from tests.sweep.oracles import P
from tests.sweep.outcome import ORACLE, RAISED, RIGHT, Outcome, compare, line, tensors, worst
from tests.sweep.running import (
    Concatenating,
    Refused,
    attached,
    judged,
    only_real,
    pairs_by_name,
    refused,
    run,
    with_gradients,
)


def prefix(bare: Any, cases: list[Case]) -> Outcome:
    """Keys and values of every layer: by concatenation, and what positions they leave to the content."""
    try:
        model, made = attached(bare, PrefixConfig(P, init=init.normal(1.0), position_offset="none"))
    except Refused as refusal:
        return refused(bare, refusal)
    except Exception as error:
        return Outcome(RAISED, "attach: " + line(error))
    found = {f"{case.name}": _concatenated(bare, model, made, case) for case in cases}
    found |= positions.checked(bare, model, cases)
    return worst(found)


def _concatenated(bare: Any, model: Any, made: Any, case: Case) -> Outcome:
    """Results and gradients against explicit concatenation, which is the model itself without a prefix."""
    pairs = pairs_by_name(model, made)
    try:
        with torch.no_grad():
            own = compare(run(Concatenating(bare, {}), case), run(bare, case))
    except Exception as error:
        return Outcome(ORACLE, "concatenation: " + line(error))
    if own.outcome != RIGHT:
        return Outcome(ORACLE, f"concatenation of nothing: {own.message}")
    leaves = [p for p in made.parameters() if p.requires_grad]
    said = judged(
        lambda: with_gradients(run(model, case), leaves),
        lambda: with_gradients(run(Concatenating(bare, pairs), case), leaves),
    )
    return said


def prompt(bare: Any, cases: list[Case]) -> Outcome:
    """A soft prompt against embeddings in front of every row: results, loss, gradient."""
    try:
        model, made = attached(bare, PromptConfig(P, init=init.normal(1.0)))
    except Refused as refusal:
        return refused(bare, refusal)
    except Exception as error:
        return Outcome(RAISED, "attach: " + line(error))
    found = {}
    for case in cases:
        length = case.inputs["input_ids"].shape[1]

        def want(case: Case = case, length: int = length) -> dict[str, Tensor]:
            leaf = made.embedding.detach().clone().requires_grad_()
            output = tensors(oracles.embedded(bare, case.inputs, leaf))
            return with_gradients(only_real(oracles.behind(output, length), case), [leaf])

        def got(case: Case = case) -> dict[str, Tensor]:
            return with_gradients(run(model, case), [made.embedding])

        found[case.name] = judged(got, want)
    return worst(found)


def own_differences(bare: Any, cases: list[Case]) -> str:
    """Where transformers' own implementations of attention give a class different results: what is right there?"""
    model = as_built(bare)
    for case in cases:
        try:
            with torch.no_grad():
                found = compare(run(model, case), run(bare, case))
        except Exception as error:
            found = Outcome(RAISED, line(error))
        if found.outcome != RIGHT:
            return f"{case.name}: {found.message}"
    return ""
