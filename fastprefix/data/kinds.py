"""The three kinds of training data, distinguished by their fields; a file holds one kind."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from fastprefix.data.batches import Row, row
from fastprefix.data.chat import check_messages, encode_chat
from fastprefix.data.lines import read_lines, string
from fastprefix.data.pairs import check_pair, encode_pair, need_eos, prompt_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Kind = Literal["pairs", "chat", "text"]
# The fields that identify a kind.
KINDS: dict[Kind, tuple[str, ...]] = {"pairs": ("prompt", "completion"), "chat": ("messages",), "text": ("text",)}
EXPECTED = "the fields prompt and completion, or messages, or text"


@dataclass(frozen=True)
class Data:
    """The content of a file: its kind, and its numbered lines with the fields of that kind only."""

    path: str
    kind: Kind
    lines: Sequence[tuple[int, dict[str, Any]]]

    @property
    def about(self) -> str:
        """The number of lines and their kind, in words."""
        one = {"pairs": "prompt/completion pair", "chat": "chat", "text": "text"}[self.kind]
        return f"{len(self.lines)} {one}{'s' if len(self.lines) != 1 else ''}"

    def encode(self, tokenizer: PreTrainedTokenizerBase, max_length: int | None = None) -> list[Row]:
        """Rows ``input_ids``, ``attention_mask`` and ``labels`` ``[L]``, unpadded.

        The labels are the completion of a pair, the assistant's messages of a chat, or all of a text.

        Raises:
            ValueError: a line cannot be encoded; the message names file and line.
        """
        rows: list[Row] = []
        for number, line in self.lines:
            try:
                rows += _encode(self.kind, line, tokenizer, max_length)
            except ValueError as error:
                raise ValueError(f"{self.path}, line {number}: {error}") from None
        return rows


def read_data(path: str | os.PathLike[str]) -> Data:
    """Read a file of JSON lines, which must all be of the kind of the first line.

    Raises:
        OSError: the file cannot be read.
        ValueError: a line is malformed or of another kind; the message names file, line and field.
    """
    kind: Kind | None = None
    lines = []
    for number, line in read_lines(path, EXPECTED):
        where = f"{path}, line {number}"
        kinds: list[Kind] = [name for name, fields in KINDS.items() if any(field in line for field in fields)]
        if kind is None:
            if not kinds:
                raise ValueError(f"{where}: got {_quoted(line) or 'no fields'}, expected {EXPECTED}")
            kind, first = kinds[0], number
        if kinds and kind not in kinds:
            expected = f"{_quoted(KINDS[kind])} as in line {first}: one kind a file"
            raise ValueError(f"{where}: got the field {_quoted(KINDS[kinds[0]])}, expected {expected}")
        if len(kinds) > 1:
            got = " beside ".join(_quoted(KINDS[name]) for name in kinds)
            raise ValueError(f"{where}: got the field {got}, expected one of them: they say what is trained on")
        lines.append((number, _check(kind, line, where)))
    assert kind is not None
    return Data(str(path), kind, lines)


def _quoted(names: Iterable[str]) -> str:
    return " and ".join(repr(name) for name in names)


def _check(kind: Kind, line: dict[str, Any], where: str) -> dict[str, Any]:
    match kind:
        case "pairs":
            return dict(check_pair(line, where))
        case "chat":
            return check_messages(line, where)
        case "text":
            return {"text": string(line, "text", where)}


def _encode(
    kind: Kind, line: dict[str, Any], tokenizer: PreTrainedTokenizerBase, max_length: int | None
) -> Sequence[Row]:
    match kind:
        case "pairs":
            return [encode_pair(line, tokenizer, max_length)]
        case "chat":
            return encode_chat(line["messages"], tokenizer, max_length)
        case "text":
            ids = [*prompt_ids(line["text"], tokenizer), need_eos(tokenizer)][:max_length]
            if len(ids) < 2:
                raise ValueError(f"max_length={max_length} leaves no token to predict")
            return [row(ids, [True] * len(ids))]
