"""Examples in the context, the same examples compressed into a prefix, and a prefix that is trained from random."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

import fastprefix
from benches.papers.experiment import Experiment, Outcome, Row, Statement, mean, values_of
from benches.papers.tasks.glosses import (
    Batch,
    completion_loss,
    heldout_batches,
    heldout_loss,
    heldout_losses,
    measured_at,
    training_batches,
)
from fastprefix import PrefixConfig, init
from fastprefix.assets.glosses import load_glosses
from fastprefix.data import encode_pairs

EXAMPLES, SLOTS, STEPS, ROWS, EVERY, RATE = 6, 32, 6, 2, 3, 1e-2
HELD_OUT, AS_TEXT = 8, 6  # held-out pairs, and how many of them are also read with the examples as text
FULL_STEPS, FULL_HELD_OUT = 500, 200
STARTS = {"own": "their own keys and values", "matched": f"the same, {SLOTS} by Attention Matching", "random": "random"}


def run(seed: int, full: bool) -> Outcome:
    """SmolLM2 and its glosses; with ``full`` more steps and all held-out pairs."""
    from fastprefix.assets.smollm2 import load_smollm2

    model, tokenizer = load_smollm2()
    held_out = heldout_batches(tokenizer, FULL_HELD_OUT if full else HELD_OUT)
    return compare(model, tokenizer, held_out, seed, FULL_STEPS if full else STEPS)


def compare(model: Any, tokenizer: Any, held_out: list[Batch], seed: int, steps: int) -> Outcome:
    """Held-out losses without examples, with them as text, and with each prefix before and after ``steps`` steps."""
    generator = torch.Generator().manual_seed(seed)
    pairs = load_glosses("train")
    chosen = [pairs[i] for i in torch.randperm(len(pairs), generator=generator)[:EXAMPLES].tolist()]
    text = "".join(f"{pair['prompt']}{pair['completion']}\n" for pair in chosen)
    tokens = len(tokenizer(text)["input_ids"])
    queries = [row[row != tokenizer.pad_token_id].tolist() for row in _prompts(tokenizer, seed)]
    starts = {
        "own": PrefixConfig(init=init.text(text, tokenizer)),
        "matched": PrefixConfig(
            init=fastprefix.attention_matching(model, text, SLOTS, tokenizer=tokenizer, queries=queries)
        ),
        "random": PrefixConfig(SLOTS, init=init.normal(0.02)),
    }
    measured = {"tokens": float(tokens), "zero_shot": heldout_loss(model, held_out)}
    drawn: dict[str, Any] = {"steps": measured_at(steps, EVERY)}
    trained = list[torch.nn.Parameter]()
    for name, config in starts.items():
        torch.manual_seed(seed)
        trained += fastprefix.attach(model, config, name).parameters()
        if name == "own":
            measured["text_difference"] = _difference_from_text(model, tokenizer, text, name)
    losses = _train(model, list(starts), trained, tokenizer, held_out, seed, steps)
    for name, curve in zip(starts, zip(*losses, strict=True), strict=True):
        drawn[name] = list(curve)
        measured[f"{name}_start"], measured[f"{name}_trained"] = curve[0], curve[-1]
    fastprefix.detach(model)
    return Outcome(measured, drawn)


def _prompts(tokenizer: Any, seed: int) -> torch.Tensor:
    return next(training_batches(tokenizer, 1, 16, seed + 1000))["input_ids"]


def _difference_from_text(model: Any, tokenizer: Any, text: str, name: str) -> float:
    """How far the loss with the attached prefix is from that of the bare model with the examples as text, in nats."""
    pairs = load_glosses("heldout", AS_TEXT)
    with_prefix = heldout_loss(model, [encode_pairs(pairs, tokenizer)])
    as_text = encode_pairs([{**pair, "prompt": text + pair["prompt"]} for pair in pairs], tokenizer)
    fastprefix.set_prefix(model, None)
    difference = abs(heldout_loss(model, [as_text]) - with_prefix)
    fastprefix.set_prefix(model, name)
    return difference


def _train(
    model: Any,
    names: list[str],
    trained: list[torch.nn.Parameter],
    tokenizer: Any,
    held_out: list[Batch],
    seed: int,
    steps: int,
) -> list[list[float]]:
    """The held-out loss of each prefix before, during and after training, every EVERY steps.

    All of them are trained in one batch. Their losses are added up, so that each is trained as if it were alone.
    """
    losses = [heldout_losses(model, held_out, names)]
    optimizer = torch.optim.AdamW(trained, lr=RATE)
    for step, batch in enumerate(training_batches(tokenizer, steps, ROWS, seed), 1):
        completion_loss(model, batch, names).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        if step in measured_at(steps, EVERY):
            losses.append(heldout_losses(model, held_out, names))
    return losses


def draw(outcomes: Sequence[Outcome]) -> Any:
    """Held-out loss against steps, with the lines of no examples and of examples as text."""
    from fastprefix.analysis.result import figure

    drawn = figure(7.5, 3.8)
    axes = drawn.subplots()
    for name, colour in zip(STARTS, ("#2b83ba", "#009e73", "#d9772b"), strict=True):
        for outcome in outcomes:
            label = f"prefix from {STARTS[name]}" if outcome is outcomes[0] else None
            axes.plot(outcome.drawn["steps"], outcome.drawn[name], "o-", color=colour, markersize=4, label=label)
    for key, label, side in (("zero_shot", "no examples", "bottom"), ("own_start", "examples as text", "top")):
        height = mean(values_of(outcomes), key)
        axes.axhline(height, color="#606060", linestyle="--", linewidth=1)
        axes.annotate(label, (1, height), xycoords=("axes fraction", "data"), va=side, ha="right", fontsize=8)
    axes.set(xlabel="step", ylabel="held-out loss of a token (nats)", title="glosses of nouns, SmolLM2-135M")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return drawn


LOSS = "{:.3f}"
EXPERIMENT = Experiment(
    name="in_context",
    claim="g",
    title="Examples in the context, and prefixes",
    papers=(
        "[Li and Liang 2021](https://arxiv.org/abs/2101.00190), Section 7.4; [ReasonCACHE "
        "2026](https://arxiv.org/abs/2602.02366)"
    ),
    setting=(
        f"SmolLM2-135M writes glosses of nouns. {EXAMPLES} examples are put in front of {HELD_OUT} held-out nouns. "
        f"The same examples become a prefix, once of all their tokens and once of {SLOTS}, and a third prefix, also "
        f"of {SLOTS}, starts at random. Each is trained for {STEPS} steps of AdamW at {RATE} on {ROWS} other glosses "
        "a step. The papers have other tasks and larger models: their direction is compared, not their figures."
    ),
    run=run,
    rows=(
        Row("tokens", "tokens of the examples", "", "{:.0f}"),
        Row("zero_shot", "no examples: held-out loss of a token (nats)", "", LOSS, 1e-3),
        Row("own_start", "examples as text, or their keys and values as a prefix", "", LOSS, 1e-3),
        Row("text_difference", "how far these two are apart", "", "{:.1e}", 1e-3),
        Row("own_trained", "their keys and values, trained", "better than examples", LOSS, 0.1),
        Row("matched_start", f"{SLOTS} of their keys and values, by Attention Matching", "", LOSS, 0.1),
        Row("matched_trained", "these, trained", "", LOSS, 0.1),
        Row("random_start", f"{SLOTS} random keys and values", "", LOSS, 0.1),
        Row("random_trained", "these, trained", "worse than from words", LOSS, 0.1),
    ),
    statements=(
        Statement(
            "Examples as a prefix of their own keys and values are the same as examples in the context.",
            lambda x: max(x["text_difference"]) < 1e-3,
        ),
        Statement(
            "A prefix that was trained from the examples does better than the examples in the context (ReasonCACHE).",
            lambda x: all(a < b for a, b in zip(x["own_trained"], x["own_start"], strict=True)),
        ),
        Statement(
            "With little training a start from words does better than a random one (Li and Liang).",
            lambda x: all(a < b for a, b in zip(x["own_trained"], x["random_trained"], strict=True)),
        ),
        Statement(
            f"{SLOTS} slots that were trained do better than all the examples in the context.",
            lambda x: all(a < b for a, b in zip(x["matched_trained"], x["own_start"], strict=True)),
        ),
    ),
    differs=(
        "The papers compare what is written: BLEU, or answers that are right. Here it is the loss of a gloss, which "
        "falls with the form that is learned as well as with what is known."
    ),
    against=(
        f"Examples in the context need no training and no further glosses, of which each prefix saw {STEPS * ROWS}. "
        "A random prefix of keys and values is a hard start, which a reparameterisation eases; longer training "
        "narrows the gap."
    ),
    draw=draw,
    minutes=0.8,
    full=f"{FULL_STEPS} steps and all {FULL_HELD_OUT} held-out nouns; how long that takes was not measured",
)
