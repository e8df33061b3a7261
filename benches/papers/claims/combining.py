"""A prefix combines tasks that a model knows, and does not teach it a new one, at as many numbers as LoRA trains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from benches.papers.experiment import Experiment, Outcome, Row, Statement, values_of
from benches.papers.tasks.drawing import BLUE, GREEN, ORANGE, bars
from benches.papers.tasks.sequence_tasks import FULL, MIX, SMALL
from benches.papers.tasks.small_transformer import (
    ROWS,
    Setting,
    Shape,
    build,
    exact_match,
    fit,
    prefixed,
    trainable,
    unfrozen,
    with_lora,
)

NEW = ("ascending + 1", "double histogram")
ALL_MAPS = ("c_attn", "c_proj", "c_fc")  # the last two of the MLP, c_proj of attention, too
SETTINGS = {
    False: Setting(
        SMALL, Shape(2, 4), {"pretrain": 800, "own": 120, "composed": 300, "counted": 600, "tuned": 300}, 1600
    ),
    True: Setting(
        FULL,
        Shape(4, 4, 256, dropout=0.1),
        {"pretrain": 40_000, "own": 40_000, "composed": 40_000, "counted": 40_000, "tuned": 40_000},
        3200,
    ),
}
# LoRA of rank r on all maps of a layer of width d trains 16 r d numbers (4 + 2 + 5 + 5), and P keys and values 2 P d.
TOKENS_OF_RANK = {1: 8, 4: 32}


def commonest(outputs: Tensor) -> float:
    """The percentage of rows that are equal to the row that is there most often."""
    return 100.0 * outputs.unique(dim=0, return_counts=True)[1].max().item() / len(outputs)


def run(seed: int, full: bool) -> Outcome:
    """One model of the mix; prefixes, LoRA and full fine-tuning on tasks of the mix and on two new ones."""
    setting = SETTINGS[full]
    data, steps = setting.sequences, setting.steps
    tests = {task: data.tests(task, setting.tests) for task in (*MIX, *NEW)}
    found: dict[str, float] = {}

    def tune(model: Any, tasks: Sequence[str], part: str, lr: float, decay: float = 0.0) -> None:
        fit(model, data.batches(tasks, steps[part], ROWS, seed + len(found)), steps[part], lr, decay)

    model = build(setting.shape, data, seed)
    tune(model, MIX, "pretrain", 1e-3 if full else 3e-3, 0.1)
    for task in NEW:
        found[f"bare {task}"] = exact_match(model, tests[task])
    for task in MIX:
        with prefixed(model, TOKENS_OF_RANK[1], seed):
            tune(model, [task], "own", 1e-1)
            found[f"prefix {task}"] = exact_match(model, tests[task])
    for task, part, rank in (("ascending + 1", "composed", 1), ("double histogram", "counted", 4)):
        with prefixed(model, TOKENS_OF_RANK[rank], seed) as prefix:
            tune(model, [task], part, 1e-1)
            found[f"prefix {task}"], found[f"size prefix {rank}"] = exact_match(model, tests[task]), trainable(prefix)
        adapted = with_lora(model, rank, seed, ALL_MAPS)
        tune(adapted, [task], part, 1e-2 if rank == 1 else 5e-3)
        found[f"lora {task}"], found[f"size lora {rank}"] = exact_match(adapted, tests[task]), trainable(adapted)
    tuned = unfrozen(model)
    tune(tuned, ["double histogram"], "tuned", 1e-3)
    found["tuned double histogram"] = exact_match(tuned, tests["double histogram"])
    found["always one"] = commonest(tests["double histogram"][1])
    return Outcome(found)


def draw(outcomes: Sequence[Outcome]) -> Any:
    """Each task by what was trained on it."""
    from fastprefix.analysis.result import figure

    values = values_of(outcomes)
    made = figure(9.6, 4.4)
    axes = made.subplots()
    named = {"prefix": ("prefix", BLUE), "LoRA of as many numbers": ("lora", ORANGE), "all weights": ("tuned", GREEN)}
    tasks = (*MIX, *NEW)
    series = {
        label: (colour, [values.get(f"{key} {task}", []) for task in tasks]) for label, (key, colour) in named.items()
    }
    bars(axes, [f"{task}\n({'new' if task in NEW else 'in the mix'})" for task in tasks], series)
    axes.set(
        ylabel="% exact", ylim=(0, 125), title="What a prefix, LoRA and fine-tuning get from a model of four tasks"
    )
    axes.legend(loc="upper center", ncols=3)
    return made


COMPOSED, COUNTED = NEW
EXPERIMENT = Experiment(
    name="combining",
    claim="c",
    title="A prefix combines what the model knows, and does not teach it a new task",
    papers="[Petrov et al. 2024](https://arxiv.org/abs/2310.19698), experiments 3 and 4",
    setting="A GPT-2 of two layers with four heads, 64 wide, is trained from nothing on four tasks at once (upwards, "
    "downwards, add 1, add 2), without a sign of which; the paper's has four layers and is 256 wide. Inputs have 6 "
    "digits of 0 to 4, the paper's 10 digits of 0 to 7. Two tasks are new: to sort upwards and add 1, a composition, "
    "and to write in place of each digit how often it is there. A prefix of 8 tokens trains as many numbers as LoRA of "
    "rank 1 on all maps of the layers, a prefix of 32 as many as rank 4: both pairs are compared after the same number "
    f"of steps. Steps of 64 inputs: {SETTINGS[False].steps['pretrain']} for the model, "
    f"{SETTINGS[False].steps['own']} for prefixes of the model's tasks, {SETTINGS[False].steps['composed']} for the "
    f"composition, {SETTINGS[False].steps['counted']} for the histogram, {SETTINGS[False].steps['tuned']} for "
    "fine-tuning; the paper trains for 40,000 each. Exact match is over 1,600 inputs that are never trained on. The "
    "published numbers are those of the paper's size, with prefixes of 10 or 12 tokens and LoRA of rank 1.",
    run=run,
    rows=(
        *(
            Row(f"prefix {task}", f"prefix of 8: {task}, in the mix, %", published, tolerance=6.0)
            for task, published in zip(MIX, ("99.7", "99.6", "100", "100"), strict=True)
        ),
        Row(f"bare {COMPOSED}", f"no prefix: {COMPOSED}, new, %", tolerance=1.0),
        Row(f"prefix {COMPOSED}", f"prefix of 8: {COMPOSED}, new, %", "71.6", tolerance=30.0),
        Row(f"lora {COMPOSED}", f"LoRA of rank 1: {COMPOSED}, %", tolerance=4.0),
        Row(f"bare {COUNTED}", f"no prefix: {COUNTED}, new, %", tolerance=1.0),
        Row("always one", f"always the commonest output: {COUNTED}, %"),
        Row(f"prefix {COUNTED}", f"prefix of 32: {COUNTED}, new, %", "0.3", tolerance=3.0),
        Row(f"lora {COUNTED}", f"LoRA of rank 4: {COUNTED}, %", "92.4 (rank 1)", tolerance=30.0),
        Row(f"tuned {COUNTED}", f"fine-tuning: {COUNTED}, %", tolerance=8.0),
        Row("size prefix 1", "trained numbers, prefix of 8", form="{:.0f}"),
        Row("size lora 1", "trained numbers, LoRA of rank 1", form="{:.0f}"),
        Row("size prefix 4", "trained numbers, prefix of 32", "12,288 (12 tokens)", form="{:.0f}"),
        Row("size lora 4", "trained numbers, LoRA of rank 4", "12,288 (rank 1)", form="{:.0f}"),
    ),
    statements=(
        Statement(
            "Prefixes elicit each task of the mix in at least 85% of the inputs.",
            lambda values: min(x for task in MIX for x in values[f"prefix {task}"]) >= 85,
        ),
        Statement(
            "A prefix combines two of the tasks: at least 25% of the inputs, of which the model does under 1% without.",
            lambda values: min(values[f"prefix {COMPOSED}"]) >= 25 and max(values[f"bare {COMPOSED}"]) < 1,
        ),
        Statement(
            "A prefix does not teach the new task: fewer than 15% of the histograms are right.",
            lambda values: max(values[f"prefix {COUNTED}"]) < 15,
        ),
        Statement(
            "It is not for lack of parameters: LoRA of exactly as many numbers gets at least 20 points more histograms "
            "right.",
            lambda values: (
                values["size prefix 1"] == values["size lora 1"]
                and values["size prefix 4"] == values["size lora 4"]
                and min(values[f"lora {COUNTED}"]) > max(values[f"prefix {COUNTED}"]) + 20
            ),
        ),
    ),
    differs="How often a prefix combines the two tasks depends on the seed here; LoRA of as many numbers does it "
    "nearly always. Of the histograms a prefix gets as many right as one output for all inputs would, which is more "
    "than in the paper, as there are fewer digits. LoRA needs rank 4 here.",
    against="Fine-tuning, which is stopped after half as many steps as LoRA, has not learned the histogram in one of "
    "the seeds, so that steps matter as much as what is trained. A prefix of 32 tokens is trained for a few "
    "hundred steps, and LoRA and prefixes at one learning rate each, so that a longer training might yet teach"
    " it more. The models are small: what is new to one may be a combination of what a larger one knows.",
    draw=draw,
    minutes=1.4,
    full="Trains the paper's size, 4 layers 256 wide with dropout 0.1 on 10 digits of 0 to 7, for 40,000 steps, and "
    "whatever tunes it for 40,000 each; how long that takes was not measured.",
)
