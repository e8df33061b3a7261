"""``{"messages": [{"role": ..., "content": ...}, ...]}``: training on the assistant's messages."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fastprefix.data.batches import Row, row
from fastprefix.data.lines import string

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = list[dict[str, Any]]
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def check_messages(line: dict[str, Any], where: str) -> dict[str, Any]:
    """The line with its messages only; ValueError naming the field that is wrong."""
    messages = line["messages"]
    if not isinstance(messages, list) or not messages:
        got = "empty" if messages == [] else type(messages).__name__
        raise ValueError(f"{where}: the field 'messages' is {got}, expected a list of messages")
    for i, message in enumerate(messages):
        at = f"{where}: messages[{i}]"
        if not isinstance(message, dict):
            raise ValueError(f"{at}: got {type(message).__name__}, expected an object with the fields role and content")
        string(message, "role", at)
        string(message, "content", at, empty=message.get("role") != "assistant")
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError(f"{where}: the field 'messages' has no message of the role assistant to train on")
    return {"messages": messages}


def render(messages: Messages, tokenizer: PreTrainedTokenizerBase, answer: bool) -> str:
    """The text of a chat by the template; with ``answer``, up to where the assistant's next message begins.

    Raises:
        ValueError: the tokenizer has no chat template, or its template does not take these messages.
    """
    from jinja2 import TemplateError

    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError("the tokenizer has no chat template, which messages need")
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer))
    except (TemplateError, TypeError) as error:
        raise ValueError(f"the chat template does not take these messages: {error}") from None


def encode_chat(messages: Messages, tokenizer: PreTrainedTokenizerBase, max_length: int | None = None) -> Sequence[Row]:
    """Encode a chat as rows whose labels are the assistant's tokens, including the token that ends each message.

    The chat is one row if the template marks the assistant's words (``{% generation %}``), or if the template's text of
    a message does not depend on later messages. Otherwise (templates that drop earlier reasoning) each message of the
    assistant is a row, after the chat as the model sees it when it answers.

    Args:
        messages: each with ``role`` and ``content``.
        tokenizer: a tokenizer with a chat template.
        max_length: the most tokens of a row, of which the end is cut off; ``None`` for no limit.

    Raises:
        ValueError: no chat template, one that does not take these messages or hides where an answer begins, or no
            room for a token of the assistant.
    """
    whole = render(messages, tokenizer, answer=False)
    if tokenizer.is_fast and _GENERATION.search(tokenizer.get_chat_template()):
        encoded = tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        return [_row(encoded["input_ids"], [bool(x) for x in encoded["assistant_masks"]], max_length)]
    turns = [_turn(messages[: i + 1], tokenizer) for i, m in enumerate(messages) if m["role"] == "assistant"]
    if all(whole.startswith(until) for _, until in turns):
        return [_marked(whole, turns, tokenizer, max_length)]
    return [_marked(until, [(before, until)], tokenizer, max_length) for before, until in turns]


def _turn(messages: Messages, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """The text of a chat without its last message, an answer, and the text with it."""
    before, until = render(messages[:-1], tokenizer, answer=True), render(messages, tokenizer, answer=False)
    if not until.startswith(before):
        raise ValueError("the chat template writes an answer other than where it asks for one: no telling where it is")
    return before, until


def _marked(
    text: str, turns: Sequence[tuple[str, str]], tokenizer: PreTrainedTokenizerBase, max_length: int | None
) -> Row:
    ids = _ids(text, tokenizer)
    trained = [False] * len(ids)
    for before, until in turns:
        first, end = (_common(ids, _ids(part, tokenizer)) for part in (before, until))
        # The model need not learn the template's text after the token that ends a message.
        ends = [i for i in range(first, end) if ids[i] == tokenizer.eos_token_id]
        end = ends[-1] + 1 if ends else end
        trained[first:end] = [True] * (end - first)
    return _row(ids, trained, max_length)


def _ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])  # the template has written the special tokens


def _common(ids: Sequence[int], others: Sequence[int]) -> int:
    """The length of the common start of two token lists: a token across the boundary belongs to the later part."""
    return next((i for i, (a, b) in enumerate(zip(ids, others)) if a != b), min(len(ids), len(others)))


def _row(ids: Sequence[int], trained: Sequence[bool], max_length: int | None) -> Row:
    if not any(trained):
        raise ValueError("the chat template marks no token as the assistant's")
    if not any(trained[:max_length]):
        raise ValueError(f"max_length={max_length} leaves no room for a token of the assistant")
    return row(ids[:max_length], trained[:max_length])
