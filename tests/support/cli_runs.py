"""A folder to run the command line in, and the training run that its tests begin with."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastprefix import cli
from tests.support.tiny_models import ROWS, save_tiny

# Words of the tiny vocabulary; what stands behind <eos> is the template's, as a line break is elsewhere.
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<bos> the ' if m.role == 'user' else '<bos> colour ' }}{{ m.content }} <eos> sky "
    "{% endfor %}{% if add_generation_prompt %}<bos> colour {% endif %}"
)
CHATS = [
    {
        "messages": [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": row["completion"].strip()},
        ]
    }
    for row in ROWS
]
TEXTS = [{"text": row["prompt"] + row["completion"]} for row in ROWS]


def write_lines(path: Path, rows: Sequence[Any]) -> Path:
    """A file of JSON lines."""
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def make_folder(folder: Path, rows: Sequence[Any] = ROWS, chat_template: str | None = None) -> Path:
    """A model in ``model`` and rows in ``data.jsonl``."""
    save_tiny(folder / "model")
    if chat_template is not None:
        (folder / "model" / "chat_template.jinja").write_text(chat_template)
    write_lines(folder / "data.jsonl", rows)
    return folder


def train(folder: Path, *options: str, output: str = "out") -> int:
    """``fastprefix train`` in such a folder; returns its exit status."""
    files = ["--model", str(folder / "model"), "--data", str(folder / "data.jsonl"), "--output", str(folder / output)]
    return cli.main(["train", *files, "--batch-size", "2", *options])
