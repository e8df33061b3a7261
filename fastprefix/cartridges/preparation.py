"""What comes before training: conversations, the predictions of the model with the whole text, and the start."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastprefix.cartridges import measure, targets
from fastprefix.cartridges.batches import Example, examples_of
from fastprefix.cartridges.config import CartridgeConfig
from fastprefix.cartridges.reading import TEXT, reading
from fastprefix.cartridges.report import WHOLE
from fastprefix.cartridges.self_study import sample, self_study
from fastprefix.cartridges.start import match_prefix, token_ids
from fastprefix.data import read_data
from fastprefix.errors import fail
from fastprefix.hf.api import set_prefix
from fastprefix.machine.files import write_atomically
from fastprefix.prefixes import init
from fastprefix.prefixes.init import Init

SHOWN = 3  # questions whose answers the report shows
SHOWN_TOKENS = 40
MOST_REFERENCE = 1024  # tokens of conversations whose queries the start is fitted to


@dataclass(frozen=True)
class Document:
    """One text, with all that its cartridge is trained and measured with."""

    ids: list[int]
    trained: list[Example]
    heldout: list[Example]
    start: Init
    first_tokens: Init
    start_seconds: float  # of the start, with reading the text
    start_cpu: float
    bytes_of_text: int
    bytes_of_cartridge: int
    questions: list[list[int]]  # token ids of a few held-out prompts
    samples: list[dict[str, str]]  # these as texts, with the answers of the model with the whole text


def prepare(
    model: Any,
    tokenizer: Any,
    text: str,
    number: int,
    folder: Path,
    config: CartridgeConfig,
    conversations: str | os.PathLike[str] | None,
    resume: bool,
    say: Callable[[str], None],
) -> Document:
    """Read a text, sample conversations unless they are given, and compute predictions and the start.

    With ``resume`` files that an earlier run has finished are read; without, they are written anew.
    """
    ids = token_ids(text, tokenizer)
    began, cpu = time.perf_counter(), time.process_time()
    with reading(model, ids, config.tokens) as whole:
        say(f"read a text of {len(ids):,} tokens in {time.perf_counter() - began:.0f} s")
        reading_seconds, reading_cpu = time.perf_counter() - began, time.process_time() - cpu
        path = Path(conversations or folder / f"conversations_{number}.jsonl")
        if conversations is None and not (resume and path.is_file()):
            sizes = {"question_tokens": config.question_tokens, "answer_tokens": config.answer_tokens}
            count, seed = config.num_conversations, config.seed + number
            lines = self_study(model, tokenizer, ids, TEXT, count, **sizes, seed=seed, progress=say)
            write_atomically(path, "".join(f"{json.dumps(line)}\n" for line in lines))
        examples = examples_of(read_data(path).encode(tokenizer), number)
        if len(examples) < 2:
            raise fail("conversations", f"{len(examples)} in {path}", "at least two: one to train on, one held out")
        set_prefix(model, TEXT)
        examples = with_targets(model, examples, folder / f"targets_{number}.safetensors", ids, config, resume)
        say(f"stored the {config.top_k} likeliest of each of {sum(len(e.labels) for e in examples):,} tokens")
        count = max(1, round(config.heldout * len(examples)))
        heldout, trained = examples[:count], examples[count:]
        began, cpu = time.perf_counter(), time.process_time()
        if config.start == "attention-matching":
            start = match_prefix(model, whole, config.tokens, reference(trained))
        else:
            start = init.token_ids(ids[: config.tokens])
        seconds, spent = time.perf_counter() - began, time.process_time() - cpu
        say(f"start in {seconds:.0f} s, {spent:.0f} s of a processor")
        questions = [example.prompt for example in heldout[:SHOWN]]
        size = sum(k.nbytes + v.nbytes for k, v in whole.key_values())
        return Document(
            ids,
            trained,
            heldout,
            start,
            init.token_ids(ids[: config.tokens]),
            reading_seconds + seconds,
            reading_cpu + spent,
            size,
            size * config.tokens // len(ids),
            questions,
            [
                {"question": tokenizer.decode(q), WHOLE: answer}
                for q, answer in zip(questions, answers(model, tokenizer, questions, TEXT), strict=True)
            ],
        )


def reference(trained: Sequence[Example]) -> list[list[int]]:
    """Rows of conversations of about MOST_REFERENCE tokens together, whose queries a start is fitted to."""
    rows: list[list[int]] = []
    for example in trained:
        if sum(map(len, rows)) >= MOST_REFERENCE:
            break
        rows.append(example.input_ids.tolist())
    return rows


def with_targets(
    model: Any, examples: list[Example], path: Path, ids: Sequence[int], config: CartridgeConfig, resume: bool
) -> list[Example]:
    """The examples with the predictions of the active prefix, from a file of an earlier run where there is one."""
    named = json.dumps(
        [name_of(model), list(ids), [e.input_ids.tolist() for e in examples], config.top_k, config.tokens]
    )
    digest = hashlib.sha256(named.encode()).hexdigest()
    if resume and path.is_file():
        stored = targets.read(path, digest)
    else:
        stored = targets.join(measure.targets(model, examples, config.batch_size, packs(model), config.top_k))
        targets.write(path, stored, digest)
    found, first = [], 0
    for example in examples:
        last = first + len(example.labels)
        found.append(replace(example, targets=stored[first:last]))
        first = last
    return found


def answers(model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], name: str) -> list[str]:
    """Greedy answers of the model with a prefix."""
    set_prefix(model, name)
    return sample(model, tokenizer, prompts, SHOWN_TOKENS, 0.0)


def packs(model: Any) -> bool:
    """Whether several conversations can stand in one row of this model, told apart by position ids."""
    return "position_ids" in inspect.signature(model.forward).parameters


def name_of(model: Any) -> str:
    """What the model is called, for the report."""
    return str(getattr(model.config, "_name_or_path", "") or type(model).__name__)
