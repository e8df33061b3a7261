"""The activations of tasks: those of language in one cluster, those of arithmetic in another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch

import fastprefix
from benches.papers.experiment import Experiment, Outcome, Row, Statement, Values
from benches.papers.tasks.prompts import of_tasks
from fastprefix import PrefixConfig, analysis, init

PROMPTS, TEXT = 10, "A glossary of nouns with one brief definition for each.\n"
ARITHMETIC = "arithmetic"
PLACES: dict[Literal["last", "mean"], str] = {"last": "last token", "mean": "mean of all tokens"}
CASES = {"bare": "without a prefix", "prefix": "with a prefix"}


def run(seed: int, full: bool) -> Outcome:
    """SmolLM2 without a prefix, and with one that a text gives; the same size with and without ``full``."""
    from fastprefix.assets.smollm2 import load_smollm2

    model, tokenizer = load_smollm2()
    return compare(model, tokenizer, seed)


def compare(model: Any, tokenizer: Any, seed: int) -> Outcome:
    """Where each task's prompts are after the last layer, and how far tasks are told apart in each."""
    batches = {}
    for task, prompts in of_tasks(PROMPTS, seed).items():
        encoded = tokenizer(prompts, return_tensors="pt", padding=True)
        batches[task] = {name: encoded[name] for name in ("input_ids", "attention_mask")}
    measured, drawn = dict[str, float](), dict[str, Any]()
    for case in CASES:
        if case == "prefix":
            fastprefix.attach(model, PrefixConfig(init=init.text(TEXT, tokenizer)))
        for at in PLACES:
            found = analysis.activations(model, batches, at=at)
            place = found.tasks.index(ARITHMETIC)
            measured[f"{at}_{case}_alone"] = float(found.groups.count(found.groups[place]) == 1)
            measured[f"{at}_{case}_ratio"] = _ratio(found.distance, place)
            drawn[f"{at}_{case}"] = {
                "tasks": list(found.tasks),
                "labels": found.labels.tolist(),
                "points": [[round(x, 3) for x in point] for point in found.points[-1].tolist()],
                "silhouette": [round(x, 4) for x in found.silhouette[1:].tolist()],
            }
    fastprefix.detach(model)
    return Outcome(measured, drawn)


def _ratio(distance: torch.Tensor, place: int) -> float:
    """The mean distance of one task from the others, divided by the mean distance among the others."""
    others = [i for i in range(len(distance)) if i != place]
    among = distance[others][:, others]
    return (distance[place, others].mean() / among[among > 0].mean()).item()


def draw(outcomes: Sequence[Outcome]) -> Any:
    """The first seed's rows after the last layer without a prefix; how far tasks are told apart by layer."""
    from fastprefix.analysis.result import figure

    drawn = figure(11, 3.8)
    panels = drawn.subplots(1, 3)
    colours = ("#2b83ba", "#009e73", "#cc79a7", "#d9772b")
    for axes, (at, words) in zip(panels, PLACES.items(), strict=False):
        found = outcomes[0].drawn[f"{at}_bare"]
        for i, (task, colour) in enumerate(zip(found["tasks"], colours, strict=True)):
            own = [point for point, label in zip(found["points"], found["labels"], strict=True) if label == i]
            axes.plot(*zip(*own, strict=True), "o", color=colour, markersize=5, label=task)
        axes.set(title=f"after the last layer, {words}", xticks=[], yticks=[])
    panels[0].legend(frameon=False, fontsize=8)
    for case, colour in (("bare", "#8a8a8a"), ("prefix", "#2b83ba")):
        for at, style in (("last", "-"), ("mean", "--")):
            for outcome in outcomes:
                label = f"{PLACES[at]}, {CASES[case]}" if outcome is outcomes[0] else None
                line = outcome.drawn[f"{at}_{case}"]["silhouette"]
                panels[2].plot(line, linestyle=style, color=colour, label=label)
    panels[2].set(title="silhouette of the tasks", xlabel="layer", ylim=(-0.1, 1))
    panels[2].legend(frameon=False, fontsize=7)
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
    return drawn


def _rows(at: str, case: str) -> tuple[Row, Row]:
    where = f"{PLACES[at]}, {CASES[case]}"
    return (
        Row(f"{at}_{case}_alone", f"{where}: arithmetic alone in one of two groups (1 is yes)", "yes", "{:.0f}"),
        Row(f"{at}_{case}_ratio", f"{where}: its distance from language / distances among language", "", "{:.2f}", 0.2),
    )


def _apart(at: str, case: str) -> Callable[[Values], bool]:
    return lambda x: min(x[f"{at}_{case}_alone"]) == 1 and min(x[f"{at}_{case}_ratio"]) > 1


EXPERIMENT = Experiment(
    name="clusters",
    claim="d",
    title="Activations by task",
    papers="[Sedov et al. 2024](https://arxiv.org/abs/2412.18582)",
    setting=(
        f"SmolLM2-135M reads {PROMPTS} prompts of each of four tasks: glosses, questions about a text, plain text "
        "and arithmetic, without a prefix and with one that a sentence about glosses gives. A prompt's place is the "
        "state of its last token after a layer, or the mean of all its tokens' states. The paper shows pictures of "
        "LLaMA-3.2-1B, without a table."
    ),
    run=run,
    rows=tuple(row for at in PLACES for case in CASES for row in _rows(at, case)),
    statements=(
        Statement(
            "By their last tokens, tasks of language are in one cluster and arithmetic is in another.",
            _apart("last", "bare"),
        ),
        Statement("With a prefix in front they are so too.", _apart("last", "prefix")),
        Statement("By the means of all tokens, without a prefix, they are so too.", _apart("mean", "bare")),
        Statement(
            "Arithmetic is further from the tasks of language than these are from one another, in all four cases.",
            lambda x: all(min(x[f"{at}_{case}_ratio"]) > 1 for at in PLACES for case in CASES),
        ),
    ),
    differs=(
        "Arithmetic is only a little further away than tasks of language are from one another, so that the split "
        "into two groups often is another one: by the means of all tokens it is short prompts, glosses with "
        "arithmetic, and long ones."
    ),
    against=(
        "The last tokens differ too: a sum ends in a sign, a gloss in a colon. Four tasks of ten prompts are few, "
        "and in a space of 576 dimensions something can always be told apart."
    ),
    draw=draw,
    minutes=0.45,
)
