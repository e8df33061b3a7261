"""Compare training steps of one causal language model: ours, PEFT's, concatenation and the frozen model.

Needs transformers; PEFT's needs peft.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastprefix.hf.storage.peft_format import pack
from fastprefix.machine.timing import Timing, interleaved
from fastprefix.measure.operator.problem import Problem
from fastprefix.measure.operator.roofline import Cost, cost
from fastprefix.measure.training.training_step import TrainingStep, cat_step, frozen_step, ours_step, peft_step

OURS, PEFT, CAT, FROZEN = "ours", "peft", "cat", "frozen"


def build_steps(
    model: nn.Module,
    ids: Tensor,
    num_virtual_tokens: int,
    names: Iterable[str] = (OURS, PEFT, FROZEN),
) -> dict[str, TrainingStep]:
    """Build the steps by name, each on a copy of the model; all copies share the model's frozen weights.

    Args:
        model: a causal language model; only its ``requires_grad`` flags are changed.
        ids: ``[B, S]`` token ids, which are the labels too.
        names: any of ``ours``, ``ours:<backend>``, ``peft``, ``cat`` and ``frozen``.

    Raises:
        ImportError: peft is asked for and not installed.
        ValueError: cat is asked for, and a prefix cannot be concatenated in this model's attention.
        AssertionError: the steps do not all compute the same loss from the same prefix.
    """
    found: dict[str, TrainingStep] = {}
    for name in names:
        mine = share_weights(model)
        if name == FROZEN:
            found[name] = frozen_step(mine, ids)
        elif name == PEFT:
            found[name] = peft_step(mine, ids, num_virtual_tokens)
        elif name == CAT:
            found[name] = cat_step(mine, ids, num_virtual_tokens)
        else:
            found[name] = ours_step(mine, ids, num_virtual_tokens, name.partition(":")[2] or "auto")
    ours = [step for step in found.values() if step.prefix is not None]
    others = [found[name] for name in (PEFT, CAT) if name in found]
    if ours and others:
        _copy_prefix(ours, found.get(PEFT), found.get(CAT))
        for step in ours:
            for other in others:
                _check_same_loss(step, other)
    return found


def share_weights(model: nn.Module) -> nn.Module:
    """A copy of the model with its own modules, hooks and config that shares parameters and buffers."""
    shared = {id(x): x for x in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def step_cost(model: nn.Module, problem: Problem) -> Cost:
    """The least cost of a step: reading every weight in forward and backward, and the arithmetic of all layers.

    Weights get no gradient, and the backward stops at the attention of the lowest layer.

    Args:
        model: a causal language model whose layers are alike.
        problem: the attention call of one layer.
    """
    linears = [(name, module.weight) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    weights = sum(weight.numel() for _, weight in linears)
    queries = [weight.numel() for name, weight in linears if name.endswith("q_proj")]
    lowest = sum(next(w.numel() for name, w in linears if name.endswith(x)) for x in ("q_proj", "k_proj", "v_proj"))
    products = 2 * problem.B * problem.S * (2 * weights - lowest)
    attention = (len(queries) - 1) * cost(problem, "backward").flops + cost(problem, "lowest").flops
    return Cost(sum((2 * w.numel()) * w.element_size() for _, w in linears), products + attention)


@torch.no_grad()
def _copy_prefix(ours: list[TrainingStep], peft: TrainingStep | None, cat: TrainingStep | None) -> None:
    first = ours[0]
    assert first.prefix is not None
    for step in ours[1:]:
        for source, target in zip(first.trained, step.trained, strict=True):
            target.copy_(source)
    pairs = first.prefix.key_values()
    if peft is not None:
        peft.trained[0].copy_(pack([k for k, _ in pairs], [v for _, v in pairs]))
    if cat is not None:
        for source, target in zip((x for pair in pairs for x in pair), cat.trained, strict=True):
            target.copy_(source)


@torch.no_grad()
def _check_same_loss(ours: TrainingStep, other: TrainingStep) -> None:
    a, b = ours.loss().item(), other.loss().item()
    exact = next(ours.model.parameters()).dtype == torch.float32
    if not abs(a - b) <= (1e-4 if exact else 2e-2) * max(1.0, abs(b)):  # so written that nan fails
        raise AssertionError(f"from the same prefix our loss is {a}, not {b} as by concatenation")


@dataclass(frozen=True)
class StepResult:
    """What was measured of one step: its time, the bytes saved for backward and, on CUDA, the peak of new bytes."""

    timing: Timing
    saved_bytes: int
    peak_bytes: int | None


def measure_steps(steps: dict[str, TrainingStep], repeats: int = 5, warmup: int = 1) -> dict[str, StepResult]:
    """Measure the memory of each step, then the times of all in turns."""
    device = next(iter(steps.values())).ids.device
    saved = {name: step.saved_bytes() for name, step in steps.items()}
    peaks = {}
    for name, step in steps.items():
        step()  # the first step allocates the optimiser's state
        peaks[name] = step.peak_bytes()
    timings = interleaved(steps, repeats, warmup, device)
    return {name: StepResult(timings[name], saved[name], peaks[name]) for name in steps}
