"""Show what training changed on one example, and the command that uses the adapter."""

from __future__ import annotations

import argparse
import re
import shlex
from typing import Any

import fastprefix
from fastprefix.data import IGNORE_INDEX, Data, Row
from fastprefix.models import complete

NEW_TOKENS = 32
SHOWN = 160  # characters of a text
TEXT_PROMPT = 8  # tokens (or words) of a plain text that serve as its prompt, at most half of it


def complete_example(model: Any, tokenizer: Any, row: Row, with_prefix: bool) -> str:
    """Complete the prompt of an example, with the attached prefix or with the model alone."""
    fastprefix.set_prefix(model, "default" if with_prefix else None)
    try:
        return complete(model, tokenizer, row["input_ids"][: _given(row)], NEW_TOKENS)
    finally:
        fastprefix.set_prefix(model, "default")


def table(tokenizer: Any, row: Row, origin: str, before: str, after: str) -> str:
    """The example, with the completions of the model alone before training and with the prefix after it."""
    given, ids, labels = _given(row), row["input_ids"], row["labels"]
    trained = labels[given:] != IGNORE_INDEX
    # In a chat with several answers, the first answer is shown.
    end = given + (len(trained) if bool(trained.all()) else int(trained.int().argmin()))
    texts = {
        "prompt": tokenizer.decode(ids[:given], skip_special_tokens=True),
        "wanted": tokenizer.decode(ids[given:end], skip_special_tokens=True),
        "before": before,
        "after": after,
    }
    lines = [f"  {name}: {_shown(text)}" for name, text in texts.items()]
    return "\n".join([f"the first of the {origin} examples, the model alone before and with its prefix after:", *lines])


def command(options: argparse.Namespace, data: Data) -> str:
    """The command line that uses the adapter on the first example's prompt."""
    words = ["fastprefix", "generate", options.output, "--model", options.model]
    words += ["--bf16"] if options.bf16 else []
    line = data.lines[0][1]
    match data.kind:
        case "pairs":
            prompt = line["prompt"]
        case "text":
            words_given = max(1, min(TEXT_PROMPT, len(line["text"].split()) // 2))
            begin = re.match(rf"(?:\s*\S+){{{words_given}}}", line["text"])
            prompt = begin[0] if begin else line["text"]
        case "chat":
            contents = {m["role"]: m["content"] for m in reversed(line["messages"])}  # the first of each role
            words += ["--chat"]
            words += ["--system", contents["system"]] if "system" in contents else []
            prompt = contents.get("user", "")
    return " ".join(map(_quoted, [*words, "--prompt", prompt]))


def _given(row: Row) -> int:
    """The number of prompt tokens of an example: those before the first trained one; in plain text, a few."""
    first = int((row["labels"] != IGNORE_INDEX).int().argmax())
    return first or max(1, min(TEXT_PROMPT, len(row["labels"]) // 2))


def _quoted(word: str) -> str:
    """Quote a word for a shell, on one line."""
    if word.isprintable():
        return shlex.quote(word)
    escapes = {"\\": r"\\", "'": r"\'", "\n": r"\n", "\r": r"\r", "\t": r"\t"}
    return "$'" + "".join(escapes.get(x, x) for x in word) + "'"


def _shown(text: str) -> str:
    return repr(text if len(text) <= SHOWN else text[: SHOWN - 4] + " ...")
