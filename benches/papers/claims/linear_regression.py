"""Regression in context is one step of gradient descent; a prefix gives that step another start."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benches.papers.experiment import Experiment, Outcome, Row, Statement, mean, values_of
from benches.papers.tasks.regression import (
    DIM,
    PAIRS,
    LinearAttention,
    SoftmaxAttention,
    best_rate,
    descent,
    draw_tasks,
    error,
    fit,
)

LENGTHS = (1, 4, 16)
STEPS = {"linear": 2000, "softmax": 1500, "prefix": 500}


def run(seed: int, full: bool) -> Outcome:
    """The paper's size, with and without ``full``."""
    generator = torch.Generator().manual_seed(seed)
    zero, moved = torch.zeros(DIM), torch.randn(DIM, generator=generator)
    moved *= DIM**0.5 / moved.norm()  # as long as a task is on average, so that every seed has as much to learn
    rate = best_rate(generator, zero)
    linear, softmax = LinearAttention(generator), SoftmaxAttention(generator)
    fit(linear, list(linear.parameters()), STEPS["linear"], 3e-3, generator, zero)
    fit(softmax, list(softmax.parameters()), STEPS["softmax"], 1e-2, generator, zero)
    x, y = draw_tasks(50_000, generator)
    with torch.no_grad():
        apart = (linear(x, y[:, :-1]) - descent(x, y[:, :-1], rate, zero)).square().mean() / y[:, -1].square().mean()
    measured = {
        "descent": error(lambda x, y: descent(x, y, rate, zero)),
        "linear": error(linear),
        "apart": 100 * apart.item(),
        "softmax": error(softmax),
        "moved_descent_zero": error(lambda x, y: descent(x, y, rate, zero), moved),
        "moved_descent_constant": _descent_and_constant(rate, moved, generator),
        "moved_descent_start": error(lambda x, y: descent(x, y, rate, moved), moved),
        "moved_linear": error(linear, moved),
        "moved_softmax": error(softmax, moved),
    }
    for name, model, speed in (("linear", linear, 1e-2), ("softmax", softmax, 3e-2)):
        model.requires_grad_(False)
        for tokens in LENGTHS:
            measured[f"{name}_p{tokens}"] = _with_prefix(model, tokens, speed, generator, moved)
    measured["linear_retrained"] = _with_prefix(copy.deepcopy(linear), 1, 3e-3, generator, moved, frozen=False)
    return Outcome(measured)


def _with_prefix(
    model: Any, tokens: int, rate: float, generator: torch.Generator, moved: Tensor, frozen: bool = True
) -> float:
    """The error on tasks around ``moved`` after a prefix was trained on them, and the model too unless it is frozen."""
    prefix = tuple(part.requires_grad_() for part in model.new_prefix(tokens, generator))
    model.requires_grad_(not frozen)
    trained = [*prefix, *(() if frozen else model.parameters())]

    def predict(x: Tensor, y: Tensor) -> Tensor:
        return model(x, y, prefix)

    fit(predict, trained, STEPS["prefix"] if frozen else STEPS["linear"], rate, generator, moved)
    return error(predict, moved)


def _descent_and_constant(rate: float, moved: Tensor, generator: torch.Generator) -> float:
    """The error of a step from zero plus ``x . c`` with the best constant c, which least squares finds."""
    zero = torch.zeros(DIM)
    x, y = draw_tasks(100_000, generator, moved)
    left = y[:, -1] - descent(x, y[:, :-1], rate, zero)
    constant = torch.linalg.lstsq(x[:, -1], left[:, None]).solution[:, 0]
    return error(lambda x, y: descent(x, y, rate, zero) + x[:, -1] @ constant, moved)


def draw(outcomes: Sequence[Outcome]) -> Any:
    """The error on moved tasks against the length of the prefix, with the lines of gradient descent."""
    from fastprefix.analysis.result import figure

    drawn = figure(7.5, 3.8)
    axes = drawn.subplots()
    for name, colour, label in (("linear", "#2b83ba", "linear attention"), ("softmax", "#d9772b", "softmax attention")):
        for outcome in outcomes:
            heights = [outcome.measured[f"moved_{name}"], *(outcome.measured[f"{name}_p{n}"] for n in LENGTHS)]
            axes.plot(range(4), heights, "o-", color=colour, label=label if outcome is outcomes[0] else None)
    for key, label in (("zero", "from 0"), ("constant", "from 0, plus a constant"), ("start", "from the new mean")):
        height = mean(values_of(outcomes), f"moved_descent_{key}")
        axes.axhline(height, color="#606060", linestyle="--", linewidth=1)
        axes.text(4.35, height, f"descent {label}", va="bottom", ha="right", fontsize=8, color="#404040")
    axes.set_xticks(range(4), ["no prefix", *(f"P = {tokens}" for tokens in LENGTHS)])
    axes.set(xlim=(-0.2, 4.4), ylabel="mean squared error", title="tasks around another mean, the model frozen")
    axes.legend(frameon=False, loc="lower left")
    axes.spines[["top", "right"]].set_visible(False)
    return drawn


NUMBER = "{:.3f}"
EXPERIMENT = Experiment(
    name="linear_regression",
    claim="g",
    title="Linear regression in context",
    papers="[von Oswald et al. 2023](https://arxiv.org/abs/2212.07677)",
    setting=(
        f"One layer of attention is trained on linear regression in {DIM} dimensions with {PAIRS} pairs in the "
        "context. Tasks are drawn around 0, then around another mean, for which a prefix is trained and the layer "
        "stays as it is. The prefix of linear attention is P more pairs of keys and values; that of softmax "
        "attention is `prefix_attention`'s. The paper has no prefix: that part is ours."
    ),
    run=run,
    rows=(
        Row("descent", "one step of gradient descent with the best rate: squared error", "", NUMBER, 0.02),
        Row("linear", "linear attention", "as descent", NUMBER, 0.02),
        Row("apart", "how far its predictions are from descent's (% of the answers' variance)", "", "{:.2f}", 0.1),
        Row("softmax", "softmax attention, two heads", "", NUMBER, 0.1),
        Row("moved_descent_zero", "tasks around another mean: descent from 0", "", NUMBER, 0.05),
        Row("moved_linear", "linear attention without a prefix", "", NUMBER, 0.05),
        Row("moved_descent_constant", "descent from 0, plus the best constant", "", NUMBER, 0.05),
        *(Row(f"linear_p{n}", f"linear attention, trained prefix, P = {n}", "", NUMBER, 0.05) for n in LENGTHS),
        Row("moved_descent_start", "descent from the new mean", "", NUMBER, 0.05),
        Row("linear_retrained", "linear attention and a prefix of P = 1, both trained", "", NUMBER, 0.05),
        Row("moved_softmax", "softmax attention without a prefix", "", NUMBER, 0.3),
        *(Row(f"softmax_p{n}", f"softmax attention, trained prefix, P = {n}", "", NUMBER, 0.4) for n in LENGTHS),
    ),
    statements=(
        Statement(
            "A trained layer of linear attention predicts as one step of gradient descent does.",
            lambda x: max(x["apart"]) < 1 and abs(mean(x, "linear") - mean(x, "descent")) < 0.02,
        ),
        Statement(
            "A prefix adds to that step what a constant adds, which one token can hold: more tokens are not better.",
            lambda x: all(abs(mean(x, f"linear_p{n}") - mean(x, "moved_descent_constant")) < 0.05 for n in LENGTHS),
        ),
        Statement(
            "It does not make the frozen layer descend from the new mean, which a prefix and a trained layer do "
            "together.",
            lambda x: (
                min(x["linear_p16"]) > 1.3 * max(x["moved_descent_start"])
                and mean(x, "linear_retrained") < mean(x, "moved_descent_start") + 0.05
            ),
        ),
        Statement(
            "In softmax attention a prefix does more, for it also scales what the content says.",
            lambda x: mean(x, "softmax_p16") < mean(x, "moved_descent_constant") - 0.1,
        ),
    ),
    differs=(
        "The paper compares losses and predictions in figures, without a table; that a trained layer of linear "
        "attention and a step of descent have the same loss is what they show, and is what we find."
    ),
    against=(
        "Softmax attention is what models have, and it is not a step of gradient descent: alone it is a little "
        "worse here, with a prefix it is better than descent with a constant. Regression of this size says little "
        "of language."
    ),
    draw=draw,
    minutes=0.45,
)
