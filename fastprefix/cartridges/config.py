"""``CartridgeConfig``: how a cartridge is made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastprefix.errors import fail
from fastprefix.validation import is_int

Start = Literal["attention-matching", "first-tokens"]


@dataclass(frozen=True)
class CartridgeConfig:
    """Sizes and training of a cartridge (Eyuboglu et al. 2025, arXiv:2506.06266).

    Args:
        tokens: P, the prefix tokens of a cartridge; at most those of its text.
        start: ``"attention-matching"`` (:func:`fastprefix.attention_matching`), or ``"first-tokens"``, the keys and
            values of the text's first P tokens, the paper's own start.
        num_frozen_tokens: leading tokens that are not trained: the first is where models put attention that they do
            not need, and training is unstable where it moves.
        num_conversations: how many conversations self-study samples about each document.
        question_tokens: most tokens of a question.
        answer_tokens: most tokens of an answer.
        heldout: the share of conversations that is not trained on, but measured.
        top_k: how many of the vocabulary's logits are stored of each token, as the teacher's.
        lr: learning rate of AdamW, which falls linearly to 0.
        epochs: how often each conversation is trained on.
        max_steps: in place of ``epochs``.
        batch_size: conversations a step.
        eval_steps: measure the held-out conversations, and save, after so many steps.
        patience: stop after so many measurements without a better one; None never stops early. The best is kept.
        distractors: with several documents, how likely a row reads another document's cartridge next to its own.
        seed: of sampling, the order of conversations and distractors.

    Raises:
        ValueError: a field is out of range; it is named.
    """

    tokens: int = 512
    start: Start = "attention-matching"
    num_frozen_tokens: int = 1
    num_conversations: int = 256
    question_tokens: int = 32
    answer_tokens: int = 64
    heldout: float = 0.1
    top_k: int = 32
    lr: float = 5e-3
    epochs: float = 4.0
    max_steps: int | None = None
    batch_size: int = 8
    eval_steps: int = 20
    patience: int | None = 5
    distractors: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        whole = ("tokens", "num_conversations", "question_tokens", "answer_tokens", "top_k", "batch_size", "eval_steps")
        for name in (*whole, *(x for x in ("max_steps", "patience") if getattr(self, x) is not None)):
            if not is_int(getattr(self, name)) or getattr(self, name) < 1:
                raise fail(name, repr(getattr(self, name)), "an int of at least 1")
        if self.start not in ("attention-matching", "first-tokens"):
            raise fail("start", repr(self.start), "'attention-matching' or 'first-tokens'")
        if not is_int(self.num_frozen_tokens) or not 0 <= self.num_frozen_tokens < self.tokens:
            raise fail("num_frozen_tokens", repr(self.num_frozen_tokens), f"an int from 0 to {self.tokens - 1}")
        if not 0.0 < self.heldout < 1.0:
            raise fail("heldout", self.heldout, "a share between 0 and 1")
        if not 0.0 <= self.distractors <= 1.0:
            raise fail("distractors", self.distractors, "a probability")
        for name in ("lr", "epochs"):
            if not 0.0 < getattr(self, name) < float("inf"):
                raise fail(name, getattr(self, name), "a positive number")
        if not is_int(self.seed) or self.seed < 0:
            raise fail("seed", repr(self.seed), "an int of at least 0")
