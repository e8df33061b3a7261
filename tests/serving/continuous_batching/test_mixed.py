"""Every request of a mixed batch gets the tokens that its own prefix gives alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fastprefix
from fastprefix import PrefixConfig, init
from fastprefix.serving.continuous_batching import enable_continuous_batching
from tests.serving.continuous_batching.engines import NEW, alone, engine, prompts, tokens_of, with_prefixes
from tests.support.tiny_models import tiny_model, tiny_qwen3

NAMES = ["p3", "p16", "p21", "p40", "projected", "prompt", None, ("p3", "p21")]


def tiny_gpt2() -> Any:
    """Learned positions, which a prefix moves too."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "initializer_range": 0.2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(vocab_size=32, bos_token_id=1, eos_token_id=2, **sizes)).eval()


def eager_llama() -> Any:
    model = tiny_model()
    model.set_attn_implementation("eager")
    return model


MODELS: dict[str, Callable[[], Any]] = {
    "llama": tiny_model,
    "eager": eager_llama,
    "qwen3": tiny_qwen3,
    "gpt2": tiny_gpt2,
}


@pytest.mark.parametrize("name", MODELS)
def test_rows_equal_attach(name: str) -> None:
    model = with_prefixes(MODELS[name]())
    before = model.config._attn_implementation
    texts = prompts(24)
    names = [NAMES[i % len(NAMES)] for i in range(len(texts))]
    want = [alone(model, ids, prefix) for ids, prefix in zip(texts, names, strict=True)]
    bare = [alone(model, ids, None) for ids in texts]
    changed = [x != y for x, y, prefix in zip(want, bare, names, strict=True) if prefix is not None]
    assert sum(changed) > len(changed) // 2  # prefixes matter here
    with engine(model) as manager:
        outputs = manager.generate(texts, names)
        again = manager.generate(texts[::-1], names[::-1])  # now with all pages in the cache
    assert tokens_of(outputs) == want
    assert tokens_of(again) == want[::-1]
    assert [output.prompt_ids for output in outputs] == texts
    assert model.config._attn_implementation == before


def test_the_active_prefix_is_the_default_and_comes_back() -> None:
    model = with_prefixes()
    texts = prompts(4)
    fastprefix.set_prefix(model, "p21")
    want = [alone(model, ids, "p21") for ids in texts]
    logits = model(torch.tensor([[5, 6]])).logits
    with engine(model) as manager:
        assert tokens_of(manager.generate(texts)) == want
        assert tokens_of(manager.generate(texts, [None] * 4)) == [alone_bare(manager, ids) for ids in texts]
        with pytest.raises(RuntimeError, match="would be without the prefix 'p21'"):
            model(torch.tensor([[5, 6]]))
    assert torch.equal(model(torch.tensor([[5, 6]])).logits, logits)
    with engine(model) as manager:
        assert tokens_of(manager.generate(texts)) == want


def alone_bare(manager: Any, ids: list[int]) -> list[int]:
    """The bare model's tokens, from a model of its own."""
    made = tiny_model().generate(torch.tensor([ids]), max_new_tokens=NEW, do_sample=False)
    found: list[int] = made[0, len(ids) :].tolist()
    return found


def test_generate_batch_reads_the_active_prefix() -> None:
    from transformers import ContinuousBatchingConfig, GenerationConfig

    model = with_prefixes()
    texts = prompts(5)
    want = [alone(model, ids, "p40") for ids in texts]
    fastprefix.set_prefix(model, "p40")
    enable_continuous_batching(model)
    generation = GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=2)
    config = ContinuousBatchingConfig(num_blocks=64)
    outputs = model.generate_batch(texts, generation_config=generation, continuous_batching_config=config)
    assert tokens_of(list(outputs.values())) == want


def test_registered_prefixes_are_read_when_named(tmp_path: Path) -> None:
    source = with_prefixes()
    for name in ("p3", "p16", "p21"):
        fastprefix.save(source, tmp_path / name, name)
    model = tiny_model()
    fastprefix.register(model, {f"stored{name}": tmp_path / name for name in ("p3", "p16", "p21")}, max_resident=1)
    texts = prompts(6)
    names = ["storedp3", "storedp16", "storedp21"] * 2
    with engine(model) as manager:
        outputs = manager.generate(texts, names)
    want = [alone(source, ids, name.removeprefix("stored")) for ids, name in zip(texts, names, strict=True)]
    assert tokens_of(outputs) == want


def test_a_prefix_that_is_trained_further_is_read_anew() -> None:
    """In one engine, with the older one's pages in the cache."""
    model = with_prefixes()
    texts = prompts(4)
    before = [alone(model, ids, "p40") for ids in texts]
    with engine(model) as manager:
        assert tokens_of(manager.generate(texts, ["p40"] * 4)) == before
        prefix = fastprefix_of(model, "p40")
        with torch.no_grad():
            for p in prefix.parameters():
                p.mul_(-1.5)
        after = manager.generate(texts, ["p40"] * 4)
        with torch.no_grad():
            for p in prefix.parameters():
                p.div_(-1.5)
        again = manager.generate(texts, ["p40"] * 4)
    assert tokens_of(again) == before
    with torch.no_grad():
        for p in prefix.parameters():
            p.mul_(-1.5)
    want = [alone(model, ids, "p40") for ids in texts]
    assert tokens_of(after) == want != before


def test_a_model_of_another_dtype_gets_pages_of_it() -> None:
    """Between two engines of one model."""
    model = with_prefixes()
    with engine(model) as manager:
        first = manager.prefixes.get("p40")
    model.double()
    texts = prompts(4)
    with engine(model) as manager:
        found = tokens_of(manager.generate(texts, ["p40"] * 4))
        second = manager.prefixes.get("p40")
    assert (first.keys[0].dtype, second.keys[0].dtype) == (torch.float32, torch.float64)
    assert not set(first.ids) & set(second.ids)
    assert found == [alone(model, ids, "p40") for ids in texts]


def fastprefix_of(model: Any, name: str) -> Any:
    from fastprefix.hf.adapters.lookup import require_installation

    return require_installation(model).selection.prefixes[name]


def test_a_name_that_changes_hands_is_read_anew() -> None:
    model = with_prefixes()
    texts = prompts(3)
    with engine(model) as manager:
        first = tokens_of(manager.generate(texts, ["p21"] * 3))
        assert first == [alone_of(model, ids) for ids in texts]
        fastprefix.detach(model, "p21")
        torch.manual_seed(99)
        fastprefix.attach(model, PrefixConfig(21, init=init.normal(1.5)), "other")
        fastprefix.set_prefix(model, None)
        with pytest.raises(ValueError, match=r"names: got 'p21', expected None or one of"):
            manager.generate(texts, ["p21"] * 3)
        second = tokens_of(manager.generate(texts, ["other"] * 3))
    assert second == [alone(model, ids, "other") for ids in texts] != first


def alone_of(model: Any, ids: list[int]) -> list[int]:
    """What ``p21`` gives, from a model like this one."""
    return alone(with_prefixes(), ids, "p21")
