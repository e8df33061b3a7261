"""A prefix scales attention among the content and adds a bias, exactly: SmolLM2 in fp64, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

import fastprefix
from benches.papers.experiment import Experiment, Outcome, Row, Statement
from benches.papers.tasks.glosses import training_batches
from fastprefix import PrefixConfig, analysis, init

TOKENS = (1, 12)  # of the two prefixes


def run(seed: int, full: bool) -> Outcome:
    """Two prefixes of random keys and values on four glosses; the same size with and without ``full``."""
    from fastprefix.assets.smollm2 import load_smollm2

    model, tokenizer = load_smollm2(torch.float64)
    batch = next(training_batches(tokenizer, 1, 4, seed))
    torch.manual_seed(seed)
    measured, drawn = dict[str, float](), dict[str, Any]()
    for tokens in TOKENS:
        name = f"p{tokens}"
        fastprefix.attach(model, PrefixConfig(tokens, init=init.normal(1.0), position_offset="none"), name)
        moved, bias = analysis.relative_attention(model, batch, name), analysis.bias_decomposition(model, batch, name)
        shift = [layer.max().item() for layer in moved.shift]
        rank = [layer.max().item() for layer in bias.rank()]
        measured[f"{name}_relative"] = max(layer.max().item() for layer in moved.error)
        measured[f"{name}_decomposition"] = max(layer.max().item() for layer in bias.error)
        measured[f"{name}_rank"] = float(max(rank))
        measured[f"{name}_lowest_shift"] = shift[0]
        measured[f"{name}_highest_shift"] = shift[-1]
        drawn[name] = {"shift": shift, "explained": [layer.mean().item() for layer in bias.explained()]}
    fastprefix.detach(model)
    return Outcome(measured, drawn)


def draw(outcomes: Sequence[Outcome]) -> Any:
    """By layer: how far attention moved from the model without a prefix, and how much of the bias is one direction."""
    from fastprefix.analysis.result import figure

    drawn = figure(9, 3.4)
    shifted, along = drawn.subplots(1, 2)
    for tokens, colour in zip(TOKENS, ("#d9772b", "#2b83ba"), strict=True):
        for outcome in outcomes:
            found, style = outcome.drawn[f"p{tokens}"], {"color": colour, "marker": "o", "markersize": 3}
            label = f"P = {tokens}" if outcome is outcomes[0] else None
            shifted.plot([max(x, 1e-17) for x in found["shift"]], label=label, **style)
            along.plot(found["explained"], label=label, **style)
    shifted.set(
        yscale="log", xlabel="layer", title="attention among the content,\nmoved from the bare model by at most"
    )
    along.set(ylim=(0, 1.05), xlabel="layer", title="share of the bias along one direction,\nmean over heads")
    for axes in (shifted, along):
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    return drawn


EXACT, SAME = "{:.1e}", "{:.2f}"
EXPERIMENT = Experiment(
    name="bias",
    claim="b",
    title="Relative attention and the bias",
    papers="[Petrov et al. 2024](https://arxiv.org/abs/2310.19698), Section 4",
    setting=(
        "SmolLM2-135M in fp64 with random keys and values as prefix, on four glosses; the largest error of all "
        "layers, heads and tokens. Positions of the content are those without a prefix. The paper's figures are "
        "those of a LLaMA with P = 1 in half precision."
    ),
    run=run,
    rows=(
        Row(
            "p1_relative",
            "P = 1: relative attention among the content, changed within a layer by",
            "4.88e-4",
            EXACT,
            1e-12,
        ),
        Row("p1_decomposition", "P = 1: error of o = (1 - m) o_c + m o_p", "9.16e-5", EXACT, 1e-10),
        Row("p1_rank", "P = 1: rank of the bias", "1", "{:.0f}"),
        Row("p12_relative", "P = 12: relative attention, changed within a layer by", "", EXACT, 1e-12),
        Row("p12_decomposition", "P = 12: error of the decomposition", "", EXACT, 1e-10),
        Row("p12_rank", "P = 12: rank of the bias", "at most P", "{:.0f}"),
        Row("p1_lowest_shift", "P = 1: attention moved from the bare model, lowest layer", "", EXACT, 1e-12),
        Row("p1_highest_shift", "P = 1: the same, highest layer", "", SAME, 0.2),
        Row("p12_lowest_shift", "P = 12: the same, lowest layer", "", EXACT, 1e-12),
        Row("p12_highest_shift", "P = 12: the same, highest layer", "", SAME, 0.2),
    ),
    statements=(
        Statement(
            "Within a layer a prefix leaves relative attention among the content as it is, to 1e-12.",
            lambda x: max(*x["p1_relative"], *x["p12_relative"]) < 1e-12,
        ),
        Statement(
            "What a prefix adds is a bias: the output is (1 - m) o_c + m o_p to 1e-9, and the bias is along one "
            "direction for P = 1 and of rank P at most.",
            lambda x: (
                max(*x["p1_decomposition"], *x["p12_decomposition"]) < 1e-9
                and max(x["p1_rank"]) == 1
                and max(x["p12_rank"]) <= 12
            ),
        ),
    ),
    differs="Our errors are those of fp64, and the published ones those of half precision. Both are rounding.",
    against=(
        "The theorem holds in one layer for the inputs that this layer has. The layers above read outputs to which "
        "a bias was added, so that their attention among the content does move, by as much as the last rows and the "
        "picture say. What cannot happen in one layer can therefore happen in the next."
    ),
    draw=draw,
    minutes=0.3,
)
