"""A start that is not what was asked for is warned of, with the numbers; how many tokens it has may be left to it."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

import fastprefix
from fastprefix import PrefixConfig, PromptConfig, init
from tests.model_zoo.architectures import ROWS

CONFIGS = [PrefixConfig, PromptConfig]


@pytest.mark.parametrize("config", CONFIGS)
def test_the_text_says_how_many(config: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = config(init=init.token_ids([5, 6, 7]))
        assert made.num_virtual_tokens == 3
        prefix = fastprefix.attach(ROWS["llama_gqa"].build(), made)
    assert prefix.num_virtual_tokens == 3


def test_given_keys_say_how_many() -> None:
    keys = [torch.randn(2, 7, 8) for _ in range(2)]
    assert PrefixConfig(init=init.kv(keys, keys)).num_virtual_tokens == 7


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize(
    ("tokens", "words"),
    [(5, "a start of 3 tokens for num_virtual_tokens=5: it is repeated"), (2, "only its first 2 are taken")],
)
def test_another_length_is_warned_of(config: Any, tokens: int, words: str) -> None:
    with pytest.warns(UserWarning, match=words) as caught:
        config(tokens, init=init.token_ids([5, 6, 7]))
    assert [w.filename for w in caught] == [__file__]


@pytest.mark.parametrize(("config", "start"), [(PrefixConfig, init.normal()), (PromptConfig, init.vocabulary())])
def test_a_start_of_no_length_needs_one(config: Any, start: Any) -> None:
    with pytest.raises(ValueError, match=f"num_virtual_tokens: got None, expected.*init='{start.name}'"):
        config(init=start)


def test_an_mlp_too_narrow_for_the_text_is_warned_of() -> None:
    text = init.token_ids(list(range(3, 67)))
    with pytest.warns(UserWarning, match=r"MLP of 32 hidden units.*64 tokens: training starts (\d+)% away") as caught:
        narrow = fastprefix.attach(ROWS["llama_gqa"].build(), PrefixConfig(prefix_projection=True, init=text))
    said = int(str(caught[0].message).split(" starts ")[1].split("%")[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wide = PrefixConfig(prefix_projection=True, encoder_hidden_size=64, init=text)
        fitted = fastprefix.attach(ROWS["llama_gqa"].build(), wide)
        exact = fastprefix.attach(ROWS["llama_gqa"].build(), PrefixConfig(init=text))

    def off(prefix: Any) -> float:
        pairs = zip(prefix.key_values(), exact.key_values(), strict=True)
        difference, whole = zip(*[((x - y).norm() ** 2, y.norm() ** 2) for p, q in pairs for x, y in zip(p, q)])
        return float((sum(difference) / sum(whole)) ** 0.5)

    assert said > 20 and abs(100 * off(narrow) - said) < 1
    assert off(fitted) < 1e-3
