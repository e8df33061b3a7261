"""Where PEFT raises or is wrong and a patched model is not: ``python -m tests.pains`` runs all and makes the table."""

from __future__ import annotations

import functools
import textwrap
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests import pain_runs as runs
from tests.model_zoo.peft_models import P_TUNING, PREFIX, PROMPT, P
from tests.support_table import README

BEGIN, END = "<!-- pains: python -m tests.pains -->", "<!-- end of pains -->"


@dataclass(frozen=True)
class Pain:
    """What a user does, PEFT's issues about it, and what comes of it: ``show(patched)``."""

    key: str
    title: str
    show: Callable[[bool], str]
    issues: tuple[int, ...] = ()

    @functools.cache  # noqa: B019 - the rows live as long as the module
    def outcome(self, patched: bool) -> str:
        """What came of it, in a few words."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                return self.show(patched)
            except Exception as error:
                return textwrap.shorten(f"{type(error).__name__}: {error}", 76, placeholder=" ...")


def _with(show: Callable[..., str], **options: Any) -> Callable[[bool], str]:
    return functools.partial(show, **options)


def _each(key: str, title: str, show: Callable[..., str], *classes: Any, issues: tuple[int, ...] = ()) -> list[Pain]:
    """A row for each kind of adapter."""
    kinds = [cls(num_virtual_tokens=P).peft_type.value for cls in classes]
    rows = zip(kinds, classes, strict=True)
    return [Pain(f"{key}-{kind}", f"{title}, {kind}", _with(show, cls=cls), issues) for kind, cls in rows]


_LEFT, _PACKED = "left-padded rows in `forward`, no `position_ids`", "packed rows (`position_ids` start anew)"
_SECOND, _STATIC = "a second `generate` with the first one's cache", '`generate(cache_implementation="static")`'
_RESUME, _TRAINER = "save, load and train on through an encoder", "`Trainer` resumes through an encoder"
_CLASSIFIER = {"cls": "DistilBertForSequenceClassification", "task": "SEQ_CLS"}

PAINS = [
    Pain("checkpointing-add", "`add_adapter` while gradient checkpointing is on",
         runs.adding_while_checkpointing, (869, 2191)),
    Pain("checkpointing", "gradient checkpointing in training", runs.checkpointing, (869, 2191)),
    *_each("left", _LEFT, runs.left_padding, PREFIX, PROMPT),
    *_each("left-generate", "the same in `generate`", runs.left_padding_in_generate, PROMPT),
    *_each("packed", _PACKED, runs.packing, PREFIX, PROMPT),
    *_each("second", _SECOND, runs.second_turn, PREFIX, PROMPT),
    *_each("static", _STATIC, runs.static, PREFIX, PROMPT),
    Pain("no-cache", "`generate(use_cache=False)`", _with(runs.generating, use_cache=False)),
    *_each("lookup", "`generate(prompt_lookup_num_tokens=3)`", runs.lookup, PREFIX, PROMPT),
    Pain("embeds", "`generate(inputs_embeds=...)`", runs.generating_from_embeddings),
    Pain("names", "`adapter_names` for each row in `forward`", _with(runs.adapter_names, generate=False), (759,)),
    Pain("names-generate", "the same in `generate`", _with(runs.adapter_names, generate=True), (759,)),
    Pain("window", "a sliding window shorter than the text", runs.window),
    Pain("zero", '`init_weights="zero"`', runs.zero),
    *_each("resume", _RESUME, runs.resuming, PREFIX, P_TUNING, issues=(1247,)),
    *_each("trainer", _TRAINER, runs.trainer_resumes, PREFIX, P_TUNING, issues=(1247,)),
    Pain("best", "`load_best_model_at_end` with a projection", runs.best_checkpoint, (2256,)),
    Pain("disabled", "`disable_adapter` on a classifier", runs.disabled_classifier),
    Pain("unwrapped", "a trainer calls `get_base_model()`", runs.unwrapped),
    Pain("no-past", "a model without `past_key_values`: DistilBERT",
         _with(runs.no_past, cls="DistilBertModel", task="FEATURE_EXTRACTION")),
    Pain("no-past-classifier", "the same with a classification head", _with(runs.no_past, **_CLASSIFIER)),
]  # fmt: skip


def line(pain: Pain, theirs: str, ours: str) -> str:
    """A pain's row: what comes of it with PEFT, and patched."""
    issues = ", ".join(f"[{n}](https://github.com/huggingface/peft/issues/{n})" for n in pain.issues)
    cells = (pain.title, issues, theirs, ours)
    return "| " + " | ".join(cell.replace("|", "\\|") or "-" for cell in cells) + " |"


def table() -> str:
    """All of them, as they are now."""
    lines = [line(pain, pain.outcome(False), pain.outcome(True)) for pain in PAINS]
    return "\n".join(["| what a user does | issues | PEFT | patched |", "|---|---|---|---|", *lines])


def fill(text: str) -> str:
    """The README with its table made anew, where it has one."""
    if BEGIN not in text:
        return text
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    print(table())
    text = README.read_text()
    if fill(text) != text:
        README.write_text(fill(text))
