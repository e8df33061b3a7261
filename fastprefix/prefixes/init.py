"""Initial values of a prefix: random, the model's own keys and values of some text, or given keys and values.

With little data, initialisation matters most in prefix tuning (Li & Liang 2021, section 7.4; PEFT's MetaMathQA
comparison), so initialising from a text takes a single call.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastprefix.errors import fail
from fastprefix.validation import is_int

MOST_COMMON = 5000  # the tokens that Lester et al. draw from


@dataclass(frozen=True)
class Init:
    """One way to initialise a prefix, made by the functions of this module."""

    name: str
    std: float = 0.02
    ids: tuple[int, ...] | None = None
    keys: tuple[Tensor, ...] | None = None
    values: tuple[Tensor, ...] | None = None
    embeddings: Tensor | None = None  # [P, d], of a soft prompt
    most_common: int | None = None
    labels: tuple[tuple[int, ...], ...] | None = None  # the token ids of each label
    zero_values: bool = False
    biases: tuple[Tensor, ...] | None = None  # [H_kv, P] of each layer, beside keys and values
    prior: str | None = None  # a distribution of a soft prompt's embeddings, see priors.py
    ratio: float = 5.0  # of the prior exclusion
    nearby: int | None = None  # of the prior interpolation: tokens that it draws from

    @property
    def of_tokens(self) -> bool:
        """Whether the initial values come from tokens of the vocabulary."""
        return self.ids is not None or self.most_common is not None

    @property
    def is_random(self) -> bool:
        """Whether the initial values are random numbers, neither given nor of tokens or the vocabulary."""
        return not self.of_tokens and self.length is None and self.prior is None

    @property
    def length(self) -> int | None:
        """The number of tokens that this initialisation has; None where it makes any number."""
        if self.ids is not None:
            return len(self.ids)
        if self.labels is not None:
            return len(self.labels)
        if self.embeddings is not None:
            return self.embeddings.shape[0]
        return self.keys[0].shape[1] if self.keys else None

    def tokens(self, num_virtual_tokens: int, vocab_size: int) -> Tensor:
        """``[P]`` token ids: drawn at random, or ``ids`` cut to P or repeated from the start until there are P."""
        if self.most_common is not None:
            return torch.randint(min(self.most_common, vocab_size), (num_virtual_tokens,))
        assert self.ids is not None
        ids = torch.tensor(self.ids, dtype=torch.long)
        return ids.repeat(-(-num_virtual_tokens // len(ids)))[:num_virtual_tokens]


def take_length(num_virtual_tokens: int | None, init: Init) -> int:
    """The number P of prefix tokens: ``num_virtual_tokens``, or if that is None the initialisation's length.

    If a text has another length, a warning with both numbers says that the text is cut or repeated. So does one for
    more labels than P.

    Raises:
        ValueError: both are None.
    """
    length = init.length
    if num_virtual_tokens is None:
        if length is None:
            expected = f"an int of at least 1, as init={init.name!r} has no length of its own"
            raise fail("num_virtual_tokens", None, expected)
        return length
    if init.ids is not None and is_int(num_virtual_tokens) and length != num_virtual_tokens:
        longer = len(init.ids) > num_virtual_tokens
        cut = f"only its first {num_virtual_tokens} are taken" if longer else "it is repeated"
        warnings.warn(
            f"fastprefix: init: a start of {length} tokens for num_virtual_tokens={num_virtual_tokens}: {cut} "
            "(leave num_virtual_tokens out to take them all once)",
            stacklevel=4,
        )
    if init.labels is not None and is_int(num_virtual_tokens) and 0 < num_virtual_tokens < len(init.labels):
        warnings.warn(
            f"fastprefix: init: {length} labels for num_virtual_tokens={num_virtual_tokens}: only the first "
            f"{num_virtual_tokens} are taken (leave num_virtual_tokens out to take them all)",
            stacklevel=4,
        )
    return num_virtual_tokens


def normal(std: float = 0.02) -> Init:
    """Independent ``N(0, std^2)`` entries. Not zeros: identical tokens would always get identical gradients."""
    if not std > 0:
        raise fail("std", std, "a positive number")
    return Init("normal", std=std)


def zero(std: float = 0.02) -> Init:
    """Values of zero and keys ``N(0, std^2)``: a prefix that says nothing yet, and all of whose tokens train.

    Keys of zero too would make all tokens equal, and equal they would stay, as in PEFT's ``init_weights="zero"``. In
    one softmax with the content the tokens still take attention from it; behind a gate at zero they change nothing.
    """
    return replace(normal(std), name="zero", zero_values=True)


def vocabulary(most_common: int = MOST_COMMON) -> Init:
    """Tokens drawn from the first ``most_common`` ids, the most frequent of a BPE vocabulary (Lester et al. 2021)."""
    if not isinstance(most_common, int) or most_common < 1:
        raise fail("most_common", repr(most_common), "an int of at least 1")
    return Init("vocabulary", most_common=most_common)


def token_ids(ids: Sequence[int] | Tensor) -> Init:
    """The model's own keys and values of these tokens, which are cut or repeated, with a warning, to P tokens.

    The keys and values are those of a text of these tokens alone. If rotary frequencies depend on a text's length
    (dynamic NTK, LongRoPE), the same tokens in front of a long text have other keys.
    """
    flat = tuple(int(i) for i in torch.as_tensor(ids).reshape(-1).tolist())
    if not flat:
        raise fail("ids", "no tokens", "at least one token id")
    return Init("token_ids", ids=flat)


def text(prompt: str, tokenizer: Any) -> Init:
    """The model's own keys and values of a text, as :func:`token_ids`. ``tokenizer``: any callable tokenizer.

    Leave ``num_virtual_tokens`` out of the config to get as many prefix tokens as the text has.
    """
    ids = tokenizer(prompt)["input_ids"]
    if not ids:
        raise fail("prompt", repr(prompt), "a text of at least one token")
    return token_ids(ids)


def labels(labels: Sequence[str], tokenizer: Any) -> Init:
    """The model's embeddings of the words of a task's classes, for a soft prompt (Lester et al. 2021, section 3.2).

    Each label is one prompt token ``[d]``, at the mean of the embeddings of the label's tokens. Where a prompt has more
    tokens than there are labels, the others are drawn as by :func:`vocabulary`. Where it has fewer, a warning says that
    only the first labels are taken. Leave ``num_virtual_tokens`` out of the config to get as many tokens as labels.

    Args:
        labels: the words as the model is to write them. To many tokenizers ``" good"`` is a word inside a text, and
            ``"good"`` is the first word of one.
        tokenizer: any callable tokenizer of transformers. Special tokens are left out.

    Raises:
        ValueError: ``labels`` is empty or a single text, or a label is no text of at least one token.
    """
    expected = "a sequence of texts of at least one token each"
    if isinstance(labels, str) or not isinstance(labels, Sequence) or not labels:
        raise fail("labels", repr(labels), expected)
    found = []
    for label in labels:
        ids = tokenizer(label, add_special_tokens=False)["input_ids"] if isinstance(label, str) and label else ()
        if not len(ids):
            raise fail("labels", repr(label), expected)
        found.append(tuple(int(i) for i in ids))
    return Init("labels", most_common=MOST_COMMON, labels=tuple(found))


def kv(keys: Any, values: Sequence[Tensor] | None = None, biases: Sequence[Tensor] | None = None) -> Init:
    """Given keys ``[H_kv, P, D]`` and values ``[H_kv, P, D_v]``, one pair per layer (all, or ``layers``).

    ``keys`` alone may be a transformers cache of batch size 1, such as a prefill's ``past_key_values``. ``biases``,
    ``[H_kv, P]`` of each layer, are for a prefix with ``prefix_bias=True``.
    """
    if values is None:
        if not hasattr(keys, "layers"):
            raise fail("keys", type(keys).__name__, "a transformers Cache, or keys and values per layer")
        layers: Any = keys.layers
        keys, values = [layer.keys for layer in layers], [layer.values for layer in layers]
    pairs: list[tuple[Tensor, ...]] = []
    for name, tensors in (("keys", keys), ("values", values)):
        squeezed = [x.squeeze(0) if isinstance(x, Tensor) and x.dim() == 4 else x for x in tensors]
        for x in squeezed:
            if not isinstance(x, Tensor) or x.dim() != 3:
                got = f"shape {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
                raise fail(name, got, "tensors [H_kv, P, D] (or [1, H_kv, P, D]), one per layer")
        pairs.append(tuple(x.detach().clone() for x in squeezed))
    if biases is None:
        return Init("kv", keys=pairs[0], values=pairs[1])
    for x, key in itertools.zip_longest(biases, pairs[0]):
        if key is None or not isinstance(x, Tensor) or x.shape != key.shape[:2]:
            got = f"shape {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise fail("biases", got, "a tensor [H_kv, P] for each layer's keys")
    return Init("kv", keys=pairs[0], values=pairs[1], biases=tuple(x.detach().clone() for x in biases))


def embeddings(given: Tensor) -> Init:
    """Given embeddings ``[P, d]`` of a soft prompt's tokens."""
    if not isinstance(given, Tensor) or given.dim() != 2 or not len(given):
        got = f"shape {list(given.shape)}" if isinstance(given, Tensor) else type(given).__name__
        raise fail("given", got, "a tensor [P, d] of at least one token")
    return Init("embeddings", embeddings=given.detach().clone())
