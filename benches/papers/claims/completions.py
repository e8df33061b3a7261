"""How many texts one position reaches in a trained model: each token of the vocabulary in it, or a trained prefix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import fastprefix
from benches.papers.experiment import Experiment, Outcome, Row, Statement, mean, values_of
from fastprefix import PrefixConfig, init
from fastprefix.assets.glosses import load_glosses

LENGTH, HARD_TOKENS, PREFIXES, STEPS, RATE = 10, 100, 6, 24, 0.2


def run(seed: int, full: bool) -> Outcome:
    """SmolLM2; with ``full`` every token of the vocabulary and 500 prefixes."""
    from fastprefix.assets.smollm2 import load_smollm2

    model, tokenizer = load_smollm2()
    generator = torch.Generator().manual_seed(seed)
    every = torch.randperm(model.config.vocab_size, generator=generator)
    hard = torch.cat([greedy(model, ids[:, None]) for ids in (every if full else every[:HARD_TOKENS]).split(250)])
    wanted = targets(tokenizer, 500 if full else PREFIXES, generator)
    parts = [trained(model, tokenizer.bos_token_id, some, seed) for some in wanted.split(PREFIXES)]
    said, rights = torch.cat([x for x, _ in parts]), torch.tensor([x for _, x in parts])
    measured = {
        "hard": 100 * len(hard.unique(dim=0)) / len(hard),
        "hard_reach": 100 * sum((hard == target).all(1).any().item() for target in wanted) / len(wanted),
        "exact": 100 * (said == wanted).all(1).double().mean().item(),
        "soft": 100 * len(said.unique(dim=0)) / len(said),
    }
    return Outcome(measured, {"right": rights.mean(0).tolist()})


def targets(tokenizer: Any, count: int, generator: torch.Generator) -> Tensor:
    """The first tokens of glosses, ``[count, LENGTH]``, each of them another text."""
    texts = [tokenizer(pair["completion"], add_special_tokens=False)["input_ids"] for pair in load_glosses("train")]
    long = torch.tensor([text[:LENGTH] for text in texts if len(text) >= LENGTH]).unique(dim=0)
    return long[torch.randperm(len(long), generator=generator)[:count]]


@torch.no_grad()
def greedy(model: Any, ids: Tensor) -> Tensor:
    """The next LENGTH likeliest tokens ``[B, LENGTH]`` after ``ids`` ``[B, S]``."""
    cache, said = None, list[Tensor]()
    for _ in range(LENGTH):
        out = model(input_ids=ids, past_key_values=cache, use_cache=True)
        cache, ids = out.past_key_values, out.logits[:, -1:].argmax(-1)
        said.append(ids)
    return torch.cat(said, 1)


def trained(model: Any, bos: int, wanted: Tensor, seed: int) -> tuple[Tensor, list[float]]:
    """Train one prefix of one token for each text, all in one batch.

    Returns:
        What each then says ``[N, LENGTH]``, and the share of right tokens at every step, in percent.
    """
    torch.manual_seed(seed)
    names = [f"text_{i}" for i in range(len(wanted))]
    for name in names:
        fastprefix.attach(model, PrefixConfig(1, init=init.normal(1.0)), name)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=RATE)
    begin = torch.full((len(wanted), 1), bos)
    right = []
    with fastprefix.prefix_batch(model, names):
        for _ in range(STEPS):
            logits = model(input_ids=torch.cat([begin, wanted[:, :-1]], 1), use_cache=False).logits
            right.append(100 * (logits.argmax(-1) == wanted).double().mean().item())
            # The mean over tokens and the sum over prefixes: each is trained as if it were alone.
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten()) * len(wanted)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        said = greedy(model, begin)
    fastprefix.detach(model)
    return said, right


def draw(outcomes: Sequence[Outcome]) -> Any:
    """Bars of unique and of reached texts; the share of right tokens while prefixes train."""
    from fastprefix.analysis.result import figure

    drawn = figure(9, 3.4)
    reached, along = drawn.subplots(1, 2)
    names = {
        "hard": "tokens:\ndifferent texts",
        "soft": "prefixes:\ndifferent texts",
        "exact": "prefixes:\nas asked for",
    }
    heights = [mean(values_of(outcomes), key) for key in names]
    bars = reached.bar(list(names.values()), heights, color=("#8a8a8a", "#2b83ba", "#d9772b"))
    reached.bar_label(bars, fmt="%.0f%%")
    reached.set(ylim=(0, 112), ylabel="%", title=f"greedy completions of {LENGTH} tokens")
    for outcome in outcomes:
        along.plot(outcome.drawn["right"], color="#d9772b")
    along.set(ylim=(0, 102), xlabel="step", ylabel="%", title="tokens of the asked text that are right")
    for axes in (reached, along):
        axes.spines[["top", "right"]].set_visible(False)
    return drawn


EXPERIMENT = Experiment(
    name="completions",
    claim="a",
    title="Unique completions of a trained model",
    papers="[Petrov et al. 2024](https://arxiv.org/abs/2310.19698), Section 3",
    setting=(
        f"SmolLM2-135M. {HARD_TOKENS} random tokens of the vocabulary are put in the first position, and the next "
        f"{LENGTH} tokens are written greedily. Then a prefix of one token is trained for each of {PREFIXES} texts, "
        f"all of them in one batch by `prefix_batch`, in {STEPS} steps of Adam at {RATE}. The texts are beginnings "
        "of glosses, which a prefix has to make the model say after its bos token. The paper did this with LLaMA, "
        "all 32,000 tokens and 48,218 prefixes."
    ),
    run=run,
    rows=(
        Row("hard", "different completions, for 100 tokens of the vocabulary", "76 (24,426 of 32,000)", tolerance=6),
        Row("hard_reach", "asked texts that one of these tokens writes (%)", "", tolerance=0),
        Row("exact", "asked texts that a trained prefix writes exactly (%)", "", tolerance=20),
        Row("soft", "different completions, for 100 trained prefixes", "97 (46,812 of 48,218)", tolerance=9),
    ),
    statements=(
        Statement(
            "A larger share of trained prefixes than of hard tokens leads to a text of its own.",
            lambda x: min(x["soft"]) > max(x["hard"]),
        ),
        Statement(
            "One trained position makes the model write at least a third of the texts asked for, and no hard token "
            "any.",
            lambda x: min(x["exact"]) > 100 / 3 and max(x["hard_reach"]) == 0,
        ),
    ),
    differs=(
        "Fewer tokens were tried, so that fewer of them can share a completion: the share of hard tokens is higher "
        "than it would be among all."
    ),
    against=(
        "A prefix of one token is 11,520 numbers here, keys and values of 30 layers, and was trained for its text; "
        "a hard token is one choice of 49,152. The texts are such as the model finds likely."
    ),
    draw=draw,
    minutes=0.6,
    full="all 49,152 tokens and 500 prefixes; how long that takes was not measured",
)
