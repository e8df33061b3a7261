"""Prompts of four tasks, three of language and one of arithmetic, with fixed vocabularies and random choices."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fastprefix.assets.glosses import load_glosses


def of_tasks(count: int, seed: int) -> dict[str, list[str]]:
    """``count`` prompts of each task by its name; the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    pairs = load_glosses("train")
    words = [pair["prompt"].removeprefix("gloss: ").split("\n")[0] for pair in pairs]
    meanings = [pair["completion"].strip() for pair in pairs]

    def pick(limit: int) -> int:
        return int(torch.randint(limit, (), generator=generator))

    def entry() -> tuple[str, str]:
        place = pick(len(words))
        return words[place], meanings[place]

    def question() -> str:
        word, meaning = entry()
        return f"Context: {word} means {meaning} Question: What does {word} mean? Answer:"

    def arithmetic() -> str:
        a, b, sign = pick(90) + 10, pick(90) + 10, "+-*"[pick(3)]
        c, d = pick(90) + 10, pick(90) + 10
        return f"{c} + {d} = {c + d}, {a} {sign} {b} ="

    tasks: dict[str, Callable[[], str]] = {
        "glosses": lambda: f"gloss: {entry()[0]}\nmeaning:",
        "questions": question,
        "plain text": lambda: " ".join(entry()[1] for _ in range(2)).rstrip("."),
        "arithmetic": arithmetic,
    }
    return {name: [make() for _ in range(count)] for name, make in tasks.items()}
