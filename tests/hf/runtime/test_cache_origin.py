"""A cache goes on with what it was made with, or says why not."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

import fastprefix
from fastprefix import PrefixConfig, PromptConfig, init
from tests.model_zoo.architectures import ROWS, VOCAB

B, S = 2, 6


def tokens(length: int = S) -> Tensor:
    return torch.randint(3, VOCAB, (B, length), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def model() -> Any:
    """With two prefixes and a soft prompt, "a" active."""
    model = ROWS["llama_gqa"].build(torch.float64)
    for name in ("b", "a"):
        fastprefix.attach(model, PrefixConfig(3, init=init.normal(1.0)), name)
    fastprefix.attach(model, PromptConfig(3, init=init.normal(1.0)), "prompt")
    fastprefix.set_prefix(model, "a")
    return model


def under(name: str | None) -> Callable[[Any], AbstractContextManager[Any]]:
    """Choose a prefix for what follows."""

    def choose(model: Any) -> AbstractContextManager[Any]:
        fastprefix.set_prefix(model, name)
        return nullcontext()

    return choose


WAYS: dict[str, Callable[[Any], AbstractContextManager[Any]]] = {
    "prefix 'a'": under("a"),
    "prefix 'b'": under("b"),
    "no prefix": under(None),
    "prefix 'prompt'": under("prompt"),
    "prefixes ['a', 'b']": lambda model: fastprefix.prefix_batch(model, ["a", "b"]),
    "prefixes ['b', 'a']": lambda model: fastprefix.prefix_batch(model, ["b", "a"]),
    "shared": lambda model: _shared(model),
}


def _shared(model: Any) -> AbstractContextManager[Any]:
    fastprefix.set_prefix(model, None)
    return fastprefix.shared_prompt(model, [5, 6, 7])


PAIRS = [(made, used) for made in WAYS for used in WAYS if made != used or made == "shared"]


@torch.no_grad()
@pytest.mark.parametrize(("made", "used"), PAIRS)
def test_another_s_cache_is_refused_and_both_are_named(model: Any, made: str, used: str) -> None:
    with WAYS[made](model):
        cache = model(input_ids=tokens(), use_cache=True).past_key_values
    names = [r"a block of shared_prompt \(number \d+\)" if x == "shared" else x for x in (made, used)]
    names = [name.replace("[", r"\[").replace("]", r"\]") for name in names]
    length = cache.get_seq_length()
    match = f"past_key_values: got a cache made with {names[0]}, expected one made with {names[1]}, which"
    with WAYS[used](model), pytest.raises(ValueError, match=match):
        model(input_ids=tokens(2), past_key_values=cache)
    assert cache.get_seq_length() == length  # as it was


@torch.no_grad()
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("copied", [False, True])
def test_the_same_goes_on(model: Any, way: str, copied: bool) -> None:
    ids = tokens()
    with warnings.catch_warnings(), WAYS[way](model):
        warnings.simplefilter("error")
        want = model(input_ids=ids, use_cache=False).logits[:, 4:]
        cache = model(input_ids=ids[:, :4], use_cache=True).past_key_values
        cache = copy.deepcopy(cache) if copied else cache
        got = model(input_ids=ids[:, 4:], past_key_values=cache).logits
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_tuples_and_given_caches_are_known_too(model: Any) -> None:
    made = model(input_ids=tokens(), use_cache=True, return_dict=False)[1]
    given, static = DynamicCache(), StaticCache(model.config, max_cache_len=16)
    for cache in (given, static):
        model(input_ids=tokens(), past_key_values=cache)
    fastprefix.set_prefix(model, "b")
    for cache in (made, given, static):
        with pytest.raises(ValueError, match="made with prefix 'a'"):
            model(input_ids=tokens(1), past_key_values=cache)
    static.reset()
    model(input_ids=tokens(), past_key_values=static)  # an empty one is anybody's


@torch.no_grad()
def test_some_rows_of_a_batch_go_on(model: Any) -> None:
    ids = tokens()
    with fastprefix.prefix_batch(model, ["a", "b"]):
        want = model(input_ids=ids, use_cache=False).logits[1:, 4:]
        cache = model(input_ids=ids[:, :4], use_cache=True).past_key_values
    cache.batch_select_indices(torch.tensor([1]))
    with fastprefix.prefix_batch(model, ["b"]):
        got = model(input_ids=ids[1:, 4:], past_key_values=cache).logits
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_a_cache_of_before_is_warned_of_once() -> None:
    model = ROWS["llama_gqa"].build()
    caches = [model(input_ids=tokens(), use_cache=True).past_key_values for _ in range(2)]
    fastprefix.attach(model, PrefixConfig(3))
    with pytest.warns(UserWarning, match="a cache of unknown origin is taken to be one made with prefix 'default'"):
        model(input_ids=tokens(1), past_key_values=caches[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(input_ids=tokens(1), past_key_values=caches[1])


@torch.no_grad()
def test_a_prefix_attached_anew_is_another(model: Any) -> None:
    cache = model(input_ids=tokens(), use_cache=True).past_key_values
    fastprefix.detach(model)
    fastprefix.attach(model, PrefixConfig(3), "a")
    with pytest.raises(ValueError, match=r"made with prefix 'a'.*expected one made with prefix 'a'"):
        model(input_ids=tokens(1), past_key_values=cache)


def test_patched_adapters_keep_their_caches_apart() -> None:
    peft = pytest.importorskip("peft")
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(ROWS["llama_gqa"].build(), config).eval()
    model.add_adapter("other", config)
    fastprefix.patch(model)
    with torch.no_grad():
        cache = model(input_ids=tokens(), use_cache=True).past_key_values
        model.set_adapter("other")
        with pytest.raises(ValueError, match="made with prefix 'default', expected one made with prefix 'other'"):
            model(input_ids=tokens(1), past_key_values=cache)
        model.set_adapter("default")
        with model.disable_adapter(), pytest.raises(ValueError, match="expected one made with no prefix"):
            model(input_ids=tokens(1), past_key_values=cache)
        model(input_ids=tokens(1), past_key_values=cache)
