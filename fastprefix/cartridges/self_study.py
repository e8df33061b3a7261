"""Self-study: the model asks itself about a text, and answers with the text in front (arXiv:2506.06266, section 4.1).

A question is sampled from the model that reads a short piece of the text and one of five instructions; its answer from
the model that reads the whole text. A cartridge is trained on such conversations, not on the text itself, so that it
answers questions rather than recites.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fastprefix.data.chat import render
from fastprefix.data.pairs import prompt_ids
from fastprefix.errors import fail
from fastprefix.hf.api import set_prefix

# The five kinds of the paper, in our words.
INSTRUCTIONS = {
    "structure": "Write one short request to list or order some information of the text above. Write the request only.",
    "summary": "Write one short request to summarise a part of the text above. Write the request only.",
    "question": "Write one short question that the text above answers. Write the question only.",
    "use case": "Write one short question about how to use what the text above describes. Write the question only.",
    "creative": "Write one short and unusual question about the text above. Write the question only.",
}
Line = dict[str, Any]  # a line of a file of conversations: a chat, or a pair of prompt and completion


def self_study(
    model: Any,
    tokenizer: Any,
    ids: Sequence[int],
    name: str,
    count: int,
    *,
    chunk_tokens: int = 64,
    question_tokens: int = 32,
    answer_tokens: int = 64,
    temperature: float = 0.7,
    batch_size: int = 16,
    seed: int = 0,
    progress: Callable[[str], None] = lambda line: None,
) -> list[Line]:
    """Conversations about a text: chats where the tokenizer has a template for them, else prompts and completions.

    Args:
        model: with the whole text attached as the prefix ``name``.
        tokenizer: of the model.
        ids: the text's token ids.
        name: of the attached whole text.
        count: how many conversations to sample. Empty questions and answers are left out.
        chunk_tokens: length of the piece of the text that a question is about.
        question_tokens: most tokens of a question.
        answer_tokens: most tokens of an answer.
        temperature: of both.
        batch_size: conversations sampled at once.
        seed: of what is drawn; the random state is left as it was.
        progress: called with a line after each batch.

    Raises:
        ValueError: no conversation came of it.
    """
    draw, lines = random.Random(seed), list[Line]()
    chat = getattr(tokenizer, "chat_template", None) is not None
    size = min(chunk_tokens, len(ids))
    kinds = list(INSTRUCTIONS.values())
    # Evenly spread over the text, from a random place each.
    firsts = [int((i + draw.random()) / count * (len(ids) - size + 1)) for i in range(count)]
    order = list(range(count))
    draw.shuffle(order)
    with torch.random.fork_rng(devices=_devices(model)):
        torch.manual_seed(seed)
        for begin in range(0, count, batch_size):
            some = order[begin : begin + batch_size]
            asked = [f"{tokenizer.decode(ids[firsts[i] : firsts[i] + size])}\n\n{kinds[i % len(kinds)]}" for i in some]
            set_prefix(model, None)
            questions = sample(
                model, tokenizer, [_prompt(x, tokenizer, chat) for x in asked], question_tokens, temperature
            )
            questions = [question for x in questions if (question := " ".join(x.split()))]
            set_prefix(model, name)
            prompts = [_prompt(x, tokenizer, chat) for x in questions]
            answers = sample(model, tokenizer, prompts, answer_tokens, temperature) if prompts else []
            lines += [_line(q, a.strip(), chat) for q, a in zip(questions, answers, strict=True) if a.strip()]
            progress(f"{min(begin + batch_size, count)} of {count} conversations")
    if not lines:
        raise fail("model", "no word of it as a question or an answer", "a model that writes some")
    return lines


def _line(question: str, answer: str, chat: bool) -> Line:
    if chat:
        return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
    return {"prompt": _plain(question), "completion": f" {answer}"}


def _plain(question: str) -> str:
    return f"Question: {question}\nAnswer:"


def _prompt(question: str, tokenizer: Any, chat: bool) -> list[int]:
    """Token ids up to where the answer begins, as ``fastprefix generate`` makes them."""
    if not chat:
        return prompt_ids(_plain(question), tokenizer)
    text = render([{"role": "user", "content": question}], tokenizer, answer=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


@torch.no_grad()
def sample(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int, temperature: float
) -> list[str]:
    """The model's completions of some prompts, sampled in one batch; greedy at temperature 0."""
    width = max(map(len, prompts))
    ends = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
    pad = min(ends, default=0) if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in prompts], device=model.device)
    lengths = torch.tensor([len(row) for row in prompts], device=model.device)
    choice = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
    out = model.generate(
        input_ids=ids,
        attention_mask=(torch.arange(width, device=model.device) >= width - lengths[:, None]).long(),
        max_new_tokens=max_new_tokens,
        max_length=None,
        eos_token_id=sorted(ends) or None,
        pad_token_id=pad,
        **{"do_sample": False, **choice},
    )
    return [str(tokenizer.decode(row, skip_special_tokens=True)) for row in out[:, width:]]


def _devices(model: Any) -> list[int]:
    return [model.device.index or 0] if model.device.type == "cuda" else []
