"""A prefix elicits each of the tasks that a model was trained on in a mix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benches.papers.experiment import Experiment, Outcome, Row, Statement, values_of
from benches.papers.tasks.drawing import BLUE, GREY, bars
from benches.papers.tasks.sequence_tasks import FULL, MIX, SMALL
from benches.papers.tasks.small_transformer import (
    ROWS,
    Setting,
    Shape,
    build,
    exact_match,
    fit,
    prefixed,
)

SETTINGS = {
    False: Setting(SMALL, Shape(1, 4, normed=False), {"pretrain": 1200, "prefix": 300}, 1600),
    True: Setting(FULL, Shape(1, 4, 256, normed=False, dropout=0.1), {"pretrain": 20_000, "prefix": 20_000}, 3200),
}
TOKENS = 1


def run(seed: int, full: bool) -> Outcome:
    """One model of the mix, without a prefix and with one of each task."""
    setting = SETTINGS[full]
    data, steps = setting.sequences, setting.steps
    model = build(setting.shape, data, seed)
    fit(model, data.batches(MIX, steps["pretrain"], ROWS, seed), steps["pretrain"], 1e-3 if full else 5e-3, 0.1)
    found: dict[str, float] = {}
    for i, task in enumerate(MIX):
        tests = data.tests(task, setting.tests)
        found[f"bare {task}"] = exact_match(model, tests)
        with prefixed(model, TOKENS, seed + i):
            fit(model, data.batches([task], steps["prefix"], ROWS, seed + i + 1), steps["prefix"], 1e-1)
            found[f"prefix {task}"] = exact_match(model, tests)
    return Outcome(found)


def draw(outcomes: Sequence[Outcome]) -> Any:
    """Each task without a prefix and with its own."""
    from fastprefix.analysis.result import figure

    values = values_of(outcomes)
    made = figure(8.0, 4.2)
    axes = made.subplots()
    named = {"no prefix": ("bare", GREY), "the task's own prefix": ("prefix", BLUE)}
    series = {label: (colour, [values[f"{key} {task}"] for task in MIX]) for label, (key, colour) in named.items()}
    bars(axes, MIX, series)
    axes.set(ylabel="% exact", ylim=(0, 122), title="One trained token tells a model of four tasks which it is to do")
    axes.legend(loc="upper left", ncols=2)
    return made


EXPERIMENT = Experiment(
    name="eliciting",
    claim="c",
    title="A prefix elicits a task that the model has learned",
    papers="[Petrov et al. 2024](https://arxiv.org/abs/2310.19698), experiment 2",
    setting="A GPT-2 of one layer with four heads, without the LayerNorm in front of attention, is trained from "
    "nothing on four tasks at once: sort upwards, sort downwards, add 1, add 2. Nothing in the input says which task "
    "it is. Each task then trains a prefix of one token, as keys and values themselves. The model is 64 wide and reads "
    "6 digits of 0 to 4, where the paper's is 256 wide and reads 10 digits of 0 to 7. It is trained for "
    f"{SETTINGS[False].steps['pretrain']} steps of 64 inputs without dropout, each prefix for "
    f"{SETTINGS[False].steps['prefix']}. Exact match is over 1,600 inputs that are never trained on; the published "
    "numbers are those of the paper's size.",
    run=run,
    rows=(
        *(
            Row(f"bare {task}", f"no prefix: {task}, %", published, tolerance=10.0)
            for task, published in zip(MIX, ("31", "19", "30", "16"), strict=True)
        ),
        *(
            Row(f"prefix {task}", f"its own prefix: {task}, %", published, tolerance=8.0)
            for task, published in zip(MIX, ("94", "84", "99.6", "99.8"), strict=True)
        ),
    ),
    statements=(
        Statement(
            "Without a prefix the model does none of the tasks in more than 40% of the inputs.",
            lambda values: max(x for task in MIX for x in values[f"bare {task}"]) < 40,
        ),
        Statement(
            "With its own prefix of one token, each task is done at least twice as often as without.",
            lambda values: all(
                own > 2 * bare
                for task in MIX
                for own, bare in zip(values[f"prefix {task}"], values[f"bare {task}"], strict=True)
            ),
        ),
        Statement(
            "With its own prefix, each task is done in most of the inputs.",
            lambda values: min(x for task in MIX for x in values[f"prefix {task}"]) > 50,
        ),
    ),
    differs="The small models do each task nearly as often as the published ones, after far fewer steps. Their inputs "
    "are shorter and have fewer digits, and a slot has keys and values of its own, not one vector for both; which of "
    "this matters was not tried.",
    against="Sorting downwards stays behind the other tasks, as in the paper. What a prefix can elicit depends on how "
    "the model was trained: it has to have learned the tasks.",
    draw=draw,
    minutes=0.5,
    full="Trains the paper's size, 256 wide with dropout 0.1 on 10 digits of 0 to 7, for 20,000 steps, and each prefix "
    "for 20,000; how long that takes was not measured.",
)
