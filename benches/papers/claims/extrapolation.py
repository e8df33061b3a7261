"""Does a prefix decide how a model completes prompts outside of its language, at an equal loss on the language?"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, get_args

import torch

from benches.papers.experiment import Experiment, Outcome, Row, Statement, Values, mean, values_of
from benches.papers.tasks import anbn
from benches.papers.tasks.drawing import BLUE, GREY, ORANGE, bars
from benches.papers.tasks.small_transformer import fit, prefixed, unfrozen

KINDS: tuple[anbn.Kind, ...] = get_args(anbn.Kind)
TOKENS = 8  # of a prefix
TUNINGS = ("prefix", "tuned")
ROWS = 16  # completions of prompts outside, beside the whole language in each batch


@dataclass(frozen=True)
class Setting:
    """The size of the model, and how long it and what tunes it are trained."""

    size: anbn.Size
    base: int
    base_lr: float
    tune: int


SETTINGS = {
    False: Setting(anbn.Size(), 1000, 5e-3, 350),
    True: Setting(anbn.Size(10, 5, 5, 1024, 256, 0.1), 30_000, 2e-3, 10_000),
}


def run(seed: int, full: bool) -> Outcome:
    """One model by maximum likelihood; prefixes and fine-tuning on two ways to complete the same prompts."""
    setting = SETTINGS[full]
    letters = setting.size.letters
    inside, outside = anbn.prompts()
    trained, tested = anbn.halves(outside)
    language = anbn.language(letters)
    found = {"entropy": anbn.entropy(letters), "base rate": 100.0 * anbn.balanced(outside).double().mean().item()}
    found["base rate tested"] = 100.0 * anbn.balanced(tested).double().mean().item()

    def look(model: Any, name: str) -> None:
        model.eval()
        with torch.no_grad():
            found[f"loss {name}"] = anbn.loss(model, *language).item()
        there = anbn.rates(model, tested, letters)
        found[f"outside {name}"], found[f"ended {name}"] = there.equal, there.ended
        found[f"ordered {name}"] = there.ordered
        found[f"inside {name}"] = anbn.rates(model, inside, letters).equal

    model = anbn.build(setting.size, seed)
    fit(model, itertools.repeat(language, setting.base), setting.base, setting.base_lr, loss=anbn.loss)
    look(model, "likelihood")
    found["outside all"] = anbn.rates(model, outside, letters).equal
    for kind in KINDS:

        def tune(model: Any, lr: float, name: str, kind: anbn.Kind = kind) -> None:
            batches = anbn.mixed_batches(trained, kind, letters, setting.tune, ROWS, seed)
            fit(model, batches, setting.tune, lr, loss=partial(anbn.loss, outside=ROWS))
            look(model, f"{kind} {name}")

        with prefixed(model, TOKENS, seed):
            tune(model, 1e-1, "prefix")
        tune(unfrozen(model), 2e-3, "tuned")
    return Outcome(found)


def draw(outcomes: Sequence[Outcome]) -> Any:
    """Completions with as many a as b by training, and the same against the loss on the language."""
    from fastprefix.analysis.result import figure

    values = values_of(outcomes)
    made = figure(9.6, 4.6)
    left, right = made.subplots(1, 2, width_ratios=[1.5, 1.0])
    colours = dict(zip(KINDS, (BLUE, ORANGE), strict=True))
    series = {
        f"{kind} completions": (colour, [values[f"outside {kind} {name}"] for name in TUNINGS])
        for kind, colour in colours.items()
    }
    bars(left, [NAMES[name] for name in TUNINGS], series)
    left.axhline(mean(values, "outside likelihood"), color="black", label="maximum likelihood")
    left.axhline(mean(values, "base rate tested"), color=GREY, linestyle="--", label="stopping at once")
    left.set(ylabel="prompts outside: as many a as b, %", ylim=(0, 145), title="What the prompts' completions teach")
    left.set_yticks(range(0, 101, 20))
    left.legend(loc="upper left", ncols=2, fontsize=8)
    right.scatter(values["loss likelihood"], values["outside likelihood"], color="black", label="maximum likelihood")
    for kind, colour in colours.items():
        for name, mark in (("prefix", "s"), ("tuned", "^")):
            key = f"{kind} {name}"
            right.scatter(
                values[f"loss {key}"],
                values[f"outside {key}"],
                color=colour,
                marker=mark,
                label=f"{kind}, {NAMES[name]}",
            )
    right.axvline(mean(values, "entropy"), color=GREY, linestyle=":", label="entropy of the language")
    right.set(xlabel="loss on the language, nats a token", title="One dot a seed", ylim=(-4, 145))
    right.set_yticks(range(0, 101, 20))
    right.legend(loc="upper right", fontsize=7, ncols=2)
    return made


BASE, TUNED = SETTINGS[False].base, SETTINGS[False].tune
# Of three sweeps: 8 wide, 8 wide, 10 wide.
LIKELIHOOD_LOSSES = ".0215 ± .0011, .0206 ± .0002, .0214 ± .0008"
LIKELIHOOD_OUTSIDE = "43.7 ± 4.4, 46.3 ± 6.1, 46.2 ± 7.4"
PUBLISHED = {"extrapolation": "83.0 ± 10.4", "adversarial": "0.0"}
LOSSES = {"extrapolation": ".0199 ± .0004", "adversarial": ".0223 ± .0009"}
INSIDE = {"extrapolation": "100", "adversarial": "12 ± 30"}
NAMES = {"prefix": f"prefix of {TOKENS}", "tuned": "all weights"}


def _rows(kind: anbn.Kind, name: str) -> tuple[Row, ...]:
    key, label, whole = f"{kind} {name}", f"{kind}, {NAMES[name]}", name == "tuned"
    ordered = Row(f"ordered {key}", f"{label}: outside, no a behind a b in what is written, %", tolerance=20.0)
    return (
        Row(
            f"outside {key}",
            f"{label}: outside, as many a as b, %",
            PUBLISHED[kind] if whole else "",
            tolerance=5.0 if whole else 25.0,
        ),
        Row(f"ended {key}", f"{label}: completions outside that end, %", tolerance=5.0 if whole else 25.0),
        Row(f"inside {key}", f"{label}: inside, as many a as b, %", INSIDE[kind] if whole else "", tolerance=40.0),
        ordered,
        Row(
            f"loss {key}",
            f"{label}: loss on the language",
            LOSSES[kind] if whole else "",
            "{:.4f}",
            0.005 if whole else 0.1,
        ),
    )


def _apart(values: Values) -> bool:
    """Whether prefixes of 8 tokens lift and lower the rate in each seed, by 15 points at least."""
    base = values["outside likelihood"]
    up, down = values["outside extrapolation prefix"], values["outside adversarial prefix"]
    return all(high > middle + 15 and low < middle - 15 for high, middle, low in zip(up, base, down, strict=True))


def _equal_loss(values: Values, name: str) -> bool:
    """Whether all losses after this tuning are within 12% of maximum likelihood's, as the paper's trainings are."""
    base = mean(values, "loss likelihood")
    return all(x < 1.12 * base for kind in KINDS for x in values[f"loss {kind} {name}"])


EXPERIMENT = Experiment(
    name="extrapolation",
    claim="e",
    title="What a prefix makes of prompts outside of the language a^n b^n",
    papers="[Reizinger et al. 2024](https://arxiv.org/abs/2405.01964)",
    setting="A GPT-2 of 3 layers, 16 wide, with 4 heads learns the texts a^n b^n of 2 to 32 letters by maximum "
    f"likelihood: {BASE} steps of all 16 texts. The paper's models are 8 or 10 wide and learn all texts of up to 256 "
    "letters. Of the 256 prompts of 8 letters, 5 begin a text of the language and 251 do not; 69 of these have as many "
    "a as b already, so that a model that stops at once is right in 27.5%. Outside, the rate is of the greedy "
    "completions that end, as in the paper. The question here is not the paper's: the model is frozen, and prefixes "
    "are trained to complete prompts outside, either by the letters that are missing (extrapolation) or by these and "
    f"one b too many (adversarial). Each of {TUNED} steps has all texts of the language and {ROWS} of these "
    "completions, without loss on the prompt. They complete 126 of the prompts outside; the other 125, every other one "
    "of those with equally many a, test every row below but the one that says all 251. The loss is of a letter or the "
    "end, over all texts of the language, which are shorter here, so that the loss cannot be compared with a published "
    "one. The published numbers are of models that were trained from nothing: of maximum likelihood three sweeps, 8, 8 "
    "and 10 wide; on completions one each, 10 wide.",
    run=run,
    rows=(
        Row("base rate", "stopping at once: all 251 prompts outside, %", "27.5"),
        Row("base rate tested", "stopping at once: the 125 tested prompts, %"),
        Row("entropy", "entropy of the language, the least loss", form="{:.4f}", tolerance=1e-9),
        Row(
            "loss likelihood",
            "maximum likelihood: loss on the language",
            LIKELIHOOD_LOSSES,
            "{:.4f}",
            0.001,
        ),
        Row(
            "outside all",
            "maximum likelihood: all 251 outside, as many a as b, %",
            LIKELIHOOD_OUTSIDE,
            tolerance=25.0,
        ),
        Row("outside likelihood", "maximum likelihood: outside, as many a as b, %", tolerance=25.0),
        Row("ended likelihood", "maximum likelihood: completions outside that end, %", tolerance=5.0),
        Row("inside likelihood", "maximum likelihood: inside, as many a as b, %", "100", tolerance=1.0),
        Row("ordered likelihood", "maximum likelihood: no a behind a b in what is written, %", "100", tolerance=5.0),
        *(row for kind in KINDS for name in TUNINGS for row in _rows(kind, name)),
    ),
    statements=(
        Statement(
            "A prefix of 8 tokens decides how the frozen model completes prompts outside that it was not trained on: "
            "15 points more or fewer have as many a as b, as its training says.",
            _apart,
        ),
        Statement(
            "The prefix does so at an equal loss on the language, that is within 12% of maximum likelihood's.",
            lambda values: _equal_loss(values, "prefix"),
        ),
        Statement(
            "Fine-tuning all weights on the same completions does both at an equal loss.",
            lambda values: (
                _equal_loss(values, "tuned")
                and min(values["outside extrapolation tuned"]) > max(values["outside likelihood"]) + 15
                and max(values["outside adversarial tuned"]) < min(values["outside likelihood"]) - 15
            ),
        ),
    ),
    differs="Maximum likelihood completes a quarter to two thirds of the prompts outside rightly here, as the seed has "
    "it, and all of the models reach the least loss that is possible. The paper's models are trained from nothing on "
    "all completions; here prefixes and fine-tuning see 126 prompts of one length, and are tested on others.",
    against="A prefix pays for it on the language itself: its loss is higher than that of the model without a prefix "
    "wherever it was measured, most of all with adversarial completions, after most of which prompts of the language "
    "fail as well. The losses of the paper's own trainings are within 12% of each other, not equal. Inside, there are "
    "only 5 prompts, 20 points each. How far a prefix lifts the rate depends on when training stops: after 300 steps "
    f"in place of {TUNED}, one of these three seeds was below maximum likelihood.",
    draw=draw,
    minutes=1.0,
    full="Trains the paper's model, 10 wide with 5 heads and 5 layers on texts of up to 256 letters with dropout 0.1, "
    "for 30,000 steps, and whatever tunes it for 10,000 each; how long that takes was not measured.",
)
