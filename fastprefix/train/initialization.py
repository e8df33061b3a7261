"""How training initialises the prefix: from the training data, from a given text, or at random."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastprefix import PrefixConfig, PromptConfig, init
from fastprefix.data import Row

NUM_VIRTUAL_TOKENS = 16
SHOWN = 100  # characters of a text


@dataclass(frozen=True)
class Initialization:
    """The configuration of the prefix, and in words how it is initialised."""

    config: PrefixConfig | PromptConfig
    about: str


def choose_initialization(options: argparse.Namespace, tokenizer: Any, rows: Sequence[Row]) -> Initialization:
    """The initialisation that ``--method``, ``--num-virtual-tokens``, ``--init`` and ``--init-text`` ask for.

    By default the prefix starts from the first P tokens of the training rows, in order and as the model reads them:
    prompts, completions and the tokens around them. They are repeated if there are fewer than P.
    """
    prompt = options.method == "prompt"
    P, asked = options.num_virtual_tokens, options.init_text
    if options.init == "random":
        P = P or NUM_VIRTUAL_TOKENS
        begin = init.vocabulary() if prompt else init.normal()
        words = "at random tokens of the vocabulary" if prompt else "at random"
    else:
        ids = _first_ids(rows, P or NUM_VIRTUAL_TOKENS) if asked is None else _text_ids(asked, tokenizer)
        P = P or (NUM_VIRTUAL_TOKENS if asked is None else len(ids))
        if asked is not None and len(ids) != P:
            _warn(f"--init-text has {len(ids)} tokens, --num-virtual-tokens is {P}: {_fitted(len(ids), P)}")
        ids = (ids * -(-P // len(ids)))[:P]
        begin = init.token_ids(ids)
        source = "of" if asked is not None else "of the first tokens of --data,"
        what = "embeddings" if prompt else "keys and values"
        words = f"at the model's own {what} {source} {_shown(tokenizer.decode(ids))}"
    if prompt:
        return Initialization(PromptConfig(P, init=begin), f"a soft prompt of {P} tokens starts {words}")
    config = PrefixConfig(P, prefix_projection=options.prefix_projection, init=begin)
    return Initialization(config, f"a prefix of {P} tokens starts {words}")


def _text_ids(text: str, tokenizer: Any) -> list[int]:
    ids = list(tokenizer(text)["input_ids"])
    if not ids:
        raise ValueError(f"--init-text: got {text!r}, expected a text of at least one token")
    return ids


def _first_ids(rows: Sequence[Row], count: int) -> list[int]:
    ids: list[int] = []
    for row in rows:
        ids += row["input_ids"].tolist()
        if len(ids) >= count:
            break
    return ids


def _fitted(length: int, P: int) -> str:
    return f"the last {length - P} are cut off" if length > P else "the text is repeated"


def _shown(text: str) -> str:
    return repr(text if len(text) <= SHOWN else text[: SHOWN - 4] + " ...")


def _warn(message: str) -> None:
    print(f"fastprefix train: warning: {message}", file=sys.stderr)
