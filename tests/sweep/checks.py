"""``attach`` of a class, with a prefix and with a soft prompt: right, refused at once, or red."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastprefix import PrefixConfig, PromptConfig, init
from tests.sweep import oracles, positions
from tests.sweep.models.build import as_built
from tests.sweep.models.inputs import Case
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
    cases, found = judged_by_all(bare, cases)
    agreed = not found
    found |= {case.name: _concatenated(bare, model, made, case) for case in cases}
    if agreed:  # elsewhere a text's own keys depend on the implementation, too
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
    cases, found = judged_by_all(bare, cases)
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


def judged_by_all(bare: Any, cases: list[Case]) -> tuple[list[Case], dict[str, Outcome]]:
    """The cases that all of transformers' own implementations of attention agree on; the others have no oracle."""
    model, agreed, found = as_built(bare), [], {}
    for case in cases:
        said = _own_difference(bare, model, case)
        if said:
            found[case.name] = Outcome(ORACLE, f"transformers' own implementations of attention differ: {said}")
        else:
            agreed.append(case)
    return agreed, found


def own_differences(bare: Any, cases: list[Case]) -> str:
    """Where transformers' own implementations of attention give a class different results: what is right there?"""
    model = as_built(bare)
    return next((f"{case.name}: {said}" for case in cases if (said := _own_difference(bare, model, case))), "")


def _own_difference(bare: Any, model: Any, case: Case) -> str:
    try:
        with torch.no_grad():
            found = compare(run(model, case), run(bare, case))
    except Exception as error:
        return line(error)
    return "" if found.outcome == RIGHT else found.message
