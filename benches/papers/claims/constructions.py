"""One virtual token that makes a transformer say any sentence and compute any map: weights by hand, nothing trained.

The claim of Section 3 of Petrov et al. (2024, arXiv:2310.19698), in a construction of ours. A layer has two heads. One
reads the virtual token, and finds in its value a number ``y / V`` for everything that may be asked. The other reads the
first token of the text. A hidden unit of the feed-forward part stands for one question, which is a first token, an own
token or a position, and lets through the number that answers it. The logit of a token t is highest for the t whose
``t / V`` is next to that number.
"""

from __future__ import annotations

import itertools
import string
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benches.papers.experiment import Experiment, Outcome, Row, Statement, mean, values_of
from fastprefix import prefix_attention

PRINTABLE = [chr(code) for code in range(32, 126)]  # 94 characters
SENTENCE = "I love transformers!"
SENTENCES, LENGTH, MAPS, PAIR_VOCABULARY = 100, 20, 100, 10
FAR = 60.0  # a score that leaves other keys a share of e^-60
Question = tuple[int | None, int | None, int | None]  # first token, own token, position: None for any


class HandBuilt:
    """A layer of attention and a feed-forward part over one-hot tokens, whose answers are in a virtual token.

    Args:
        vocabulary: V, the number of tokens.
        positions: the longest text.
        questions: the hidden units; no two may be true of the same row.
    """

    def __init__(self, vocabulary: int, positions: int, questions: Sequence[Question]) -> None:
        self.vocabulary, self.positions = vocabulary, positions
        first, own, position = zip(*questions, strict=True)
        parts = [_one_hots(first, vocabulary), _one_hots(own, vocabulary), _one_hots(position, positions)]
        self.asked = torch.cat(parts, 1)  # [units, 2 V + positions]
        self.threshold = self.asked.sum(1)  # of all that a unit asks for

    def virtual_token(self, answers: Sequence[int]) -> Tensor:
        """The embedding ``[units]`` of the virtual token that gives each question its answer."""
        return torch.tensor(answers, dtype=torch.float64) / self.vocabulary

    def next_tokens(self, ids: Tensor, virtual: Tensor) -> Tensor:
        """The likeliest token ``[B]`` after each row of ``ids`` ``[B, S]``, with one virtual token in front of all."""
        rows, length = ids.shape
        tokens = torch.nn.functional.one_hot(ids, self.vocabulary).double()
        place = torch.eye(self.positions, dtype=torch.float64)[length - 1].expand(rows, -1)
        # Keys have two numbers: whether they are the virtual token, and whether they are the first one of the text.
        # Head 0 asks for the virtual token, head 1 for the first one, each of them with a score of FAR.
        wanted = torch.eye(2, dtype=torch.float64)
        q = FAR * wanted[:, None].expand(rows, 2, 1, 2)  # only the last token's row is of use
        k = torch.zeros(rows, 2, length, 2, dtype=torch.float64)
        k[:, :, 0, 1] = 1
        v = torch.nn.functional.pad(tokens, (len(virtual), 0))[:, None].expand(rows, 2, length, -1)
        prefix_k = wanted[0].expand(2, 1, 2)
        prefix_v = torch.nn.functional.pad(virtual, (0, self.vocabulary)).expand(2, 1, -1)
        out = prefix_attention(q, k, v, prefix_k, prefix_v, scale=1.0)[:, :, 0]
        answers, first = out[:, 0, : len(virtual)], out[:, 1, len(virtual) :]
        matched = torch.cat([first, tokens[:, -1], place], 1) @ self.asked.T - self.threshold
        # An answer is below 1, so that a unit whose question is not asked stays at 0.
        answer = (matched + answers).relu().sum(1, keepdim=True)
        levels = torch.arange(self.vocabulary, dtype=torch.float64) / self.vocabulary
        return (2 * answer * levels - levels.square()).argmax(1)

    def write(self, ids: Tensor, virtual: Tensor, tokens: int) -> list[list[int]]:
        """The next ``tokens`` tokens of each row, one after the other."""
        start = ids.shape[1]
        for _ in range(tokens):
            ids = torch.cat([ids, self.next_tokens(ids, virtual)[:, None]], 1)
        return ids[:, start:].tolist()


def _one_hots(chosen: Sequence[int | None], size: int) -> Tensor:
    """Rows of the identity, and zeros for None: ``[len(chosen), size]``."""
    rows = torch.zeros(len(chosen), size, dtype=torch.float64)
    for row, index in zip(rows, chosen, strict=True):
        if index is not None:
            row[index] = 1
    return rows


def run(seed: int, full: bool) -> Outcome:
    """All four constructions; the same sizes with and without ``full``."""
    generator = torch.Generator().manual_seed(seed)
    return Outcome({**_sentences(generator), **_case_flip(), **_words(generator), **_pairs(generator)})


def _encode(text: str) -> list[int]:
    return [PRINTABLE.index(letter) for letter in text]


def _sentences(generator: torch.Generator) -> dict[str, float]:
    size = len(PRINTABLE)
    model = HandBuilt(size, LENGTH, [(None, None, place) for place in range(LENGTH)])
    targets = torch.randint(size, (SENTENCES - 1, LENGTH), generator=generator).tolist()
    targets.append(_encode(SENTENCE))
    begin = torch.tensor([[0]])
    said = [model.write(begin, model.virtual_token(target), LENGTH) == [target] for target in targets]
    # A token of the vocabulary in the same place: it has no answers, whichever token it is.
    nothing = torch.zeros(LENGTH, dtype=torch.float64)
    hard = {tuple(text) for text in model.write(torch.arange(size)[:, None], nothing, LENGTH)}
    return {"sentences": 100 * sum(said) / len(said), "hard": float(len(hard))}


def _case_flip() -> dict[str, float]:
    size = len(PRINTABLE)
    model = HandBuilt(size, 1, [(None, token, None) for token in range(size)])
    flipped = _encode("".join(PRINTABLE).swapcase())
    written = model.write(torch.arange(size)[:, None], model.virtual_token(flipped), 1)
    return {"flipped": _percent(written, [[token] for token in flipped])}


def _words(generator: torch.Generator) -> dict[str, float]:
    letters, length = _encode(string.ascii_letters), 8
    model = HandBuilt(len(PRINTABLE), length, [(a, None, place) for a in letters for place in range(length)])
    words = torch.randint(len(PRINTABLE), (len(letters), length), generator=generator)
    virtual = model.virtual_token(words.flatten().tolist())
    return {"words": _percent(model.write(torch.tensor(letters)[:, None], virtual, length), words.tolist())}


def _pairs(generator: torch.Generator) -> dict[str, float]:
    size = PAIR_VOCABULARY
    pairs = list(itertools.product(range(size), repeat=2))
    model = HandBuilt(size, 2, [(a, b, 1) for a, b in pairs])
    tables = torch.randint(size, (MAPS, len(pairs), 1), generator=generator).tolist()
    virtual = [model.virtual_token([y for (y,) in table]) for table in tables]
    right = [model.write(torch.tensor(pairs), one, 1) == table for one, table in zip(virtual, tables, strict=True)]
    return {"pairs": 100 * sum(right) / MAPS}


def _percent(written: list[list[int]], wanted: list[list[int]]) -> float:
    return 100 * sum(a == b for a, b in zip(written, wanted, strict=True)) / len(wanted)


def draw(outcomes: Sequence[Outcome]) -> Any:
    """Two bars: how many sentences each kind of token reaches."""
    from fastprefix.analysis.result import figure

    drawn = figure(7, 3)
    axes = drawn.subplots()
    names = ("any of the 94 hard tokens", "one virtual token, chosen freely")
    counts = (max(x.measured["hard"] for x in outcomes), SENTENCES * mean(values_of(outcomes), "sentences") / 100)
    bars = axes.barh(names, counts, color=("#8a8a8a", "#2b83ba"))
    axes.bar_label(bars, fmt="%.0f", padding=3)
    axes.set_xscale("log")
    axes.set_xlim(0.5, 500)
    axes.set_xlabel(f"different texts of {LENGTH} characters written, of {SENTENCES} asked for")
    axes.set_title("One position in front of a transformer by hand", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    return drawn


EXPERIMENT = Experiment(
    name="constructions",
    claim="a",
    title="Constructions by hand",
    papers="[Petrov et al. 2024](https://arxiv.org/abs/2310.19698), Section 3",
    setting=(
        "The sizes are the paper's; the weights are ours, in fp64 with `prefix_attention`. One layer with two heads "
        "reads a single virtual token. Hidden units of the feed-forward part pick what it says of this row."
    ),
    run=run,
    rows=(
        Row("sentences", f"texts of {LENGTH} printable characters written as asked for, of {SENTENCES} (%)", "100"),
        Row("hard", "different texts that the 94 hard tokens write in that place", "at most 94", "{:.0f}"),
        Row("flipped", "characters whose case is flipped (%)", "100"),
        Row("words", "the 52 letters, each with its own word of 8 characters (%)", "100"),
        Row("pairs", f"{MAPS} random maps of two tokens to one, right for all 100 pairs (%)", "100"),
    ),
    statements=(
        Statement(
            "One virtual token, chosen freely, makes a fixed transformer write any text and compute any of these maps.",
            lambda x: all(mean(x, key) == 100 for key in ("sentences", "flipped", "words", "pairs")),
        ),
        Statement(
            "A token of the vocabulary in the same place reaches at most as many texts as there are tokens.",
            lambda x: max(x["hard"]) <= len(PRINTABLE),
        ),
    ),
    differs="It does not. Hard tokens carry no answers in this construction, so that they all write the same text.",
    against=(
        "That such weights exist says nothing of trained ones: nobody finds such a transformer by training. The "
        "virtual token is as wide as all the answers that it holds, in fp64, and needs a unit for each."
    ),
    draw=draw,
)
