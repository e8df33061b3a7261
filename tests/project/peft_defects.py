"""Where PEFT raises or is wrong and a patched model is not: a table in ``docs/peft.md``.

``python -m tests.project.peft_defects`` runs every case, with PEFT alone and patched, and writes the table.
"""

from __future__ import annotations

import functools
import textwrap
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.model_zoo.peft_models import P_TUNING, PREFIX, PROMPT, P
from tests.project import peft_defect_cases as cases

PAGE = Path(__file__).parents[2] / "docs" / "peft.md"
BEGIN, END = "<!-- defects: python -m tests.project.peft_defects -->", "<!-- end of defects -->"


@dataclass(frozen=True)
class Defect:
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


def _each(key: str, title: str, show: Callable[..., str], *classes: Any, issues: tuple[int, ...] = ()) -> list[Defect]:
    """A row for each kind of adapter."""
    kinds = [cls(num_virtual_tokens=P).peft_type.value for cls in classes]
    rows = zip(kinds, classes, strict=True)
    return [Defect(f"{key}-{kind}", f"{title}, {kind}", _with(show, cls=cls), issues) for kind, cls in rows]


_LEFT, _PACKED = "left-padded rows in `forward`, no `position_ids`", "packed rows (`position_ids` start at 0 again)"
_SECOND, _STATIC = "a second `generate` with the first one's cache", '`generate(cache_implementation="static")`'
_RESUME, _TRAINER = "save, load and train on through an encoder", "`Trainer` resumes through an encoder"
_CLASSIFIER = {"cls": "DistilBertForSequenceClassification", "task": "SEQ_CLS"}

DEFECTS = [
    Defect("checkpointing-add", "`add_adapter` while gradient checkpointing is on",
         cases.adding_while_checkpointing, (869, 2191)),
    Defect("checkpointing", "gradient checkpointing in training", cases.checkpointing, (869, 2191)),
    *_each("left", _LEFT, cases.left_padding, PREFIX, PROMPT),
    *_each("left-generate", "the same in `generate`", cases.left_padding_in_generate, PROMPT),
    *_each("packed", _PACKED, cases.packing, PREFIX, PROMPT),
    *_each("second", _SECOND, cases.second_turn, PREFIX, PROMPT),
    *_each("static", _STATIC, cases.static, PREFIX, PROMPT),
    Defect("no-cache", "`generate(use_cache=False)`", _with(cases.generating, use_cache=False)),
    *_each("lookup", "`generate(prompt_lookup_num_tokens=3)`", cases.lookup, PREFIX, PROMPT),
    Defect("embeds", "`generate(inputs_embeds=...)`", cases.generating_from_embeddings),
    Defect("names", "`adapter_names` for each row in `forward`", _with(cases.adapter_names, generate=False), (759,)),
    Defect("names-generate", "the same in `generate`", _with(cases.adapter_names, generate=True), (759,)),
    Defect("window", "a sliding window shorter than the text", cases.window),
    Defect("zero", '`init_weights="zero"`', cases.zero),
    *_each("resume", _RESUME, cases.resuming, PREFIX, P_TUNING, issues=(1247,)),
    *_each("trainer", _TRAINER, cases.trainer_resumes, PREFIX, P_TUNING, issues=(1247,)),
    Defect("best", "`load_best_model_at_end` with a projection", cases.best_checkpoint, (2256,)),
    Defect("disabled", "`disable_adapter` on a classifier", cases.disabled_classifier),
    Defect("unwrapped", "a trainer calls `get_base_model()`", cases.unwrapped),
    Defect("slots", "a prefix of an encoder-decoder (BART)", cases.slots_of_an_encoder_decoder, (410,)),
    Defect("no-past", "a model without `past_key_values`: DistilBERT",
         _with(cases.no_past, cls="DistilBertModel", task="FEATURE_EXTRACTION")),
    Defect("no-past-classifier", "the same with a classification head", _with(cases.no_past, **_CLASSIFIER)),
]  # fmt: skip


def line(defect: Defect, theirs: str, ours: str) -> str:
    """A defect's row: what comes of it with PEFT, and patched."""
    issues = ", ".join(f"[{n}](https://github.com/huggingface/peft/issues/{n})" for n in defect.issues)
    cells = (defect.title, issues, theirs, ours)
    return "| " + " | ".join(cell.replace("|", "\\|") or "-" for cell in cells) + " |"


def table() -> str:
    """All of them, as they are now."""
    lines = [line(defect, defect.outcome(False), defect.outcome(True)) for defect in DEFECTS]
    return "\n".join(["| what a user does | issues | PEFT | patched |", "|---|---|---|---|", *lines])


def fill(text: str) -> str:
    """A page with its table replaced by what the cases give now; a page without the marks is left as it is."""
    if BEGIN not in text:
        return text
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    print(table())
    PAGE.write_text(fill(PAGE.read_text()))
