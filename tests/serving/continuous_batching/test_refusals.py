"""What continuous batching refuses: models, prefixes and requests, each by its reason and before anything runs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import fastprefix
from fastprefix import LlamaAdapterConfig, PrefixConfig, PrefixMemoryConfig, PromptConfig, init
from fastprefix.serving.continuous_batching import enable_continuous_batching
from tests.serving.continuous_batching.engines import alone, engine, with_prefixes
from tests.support.tiny_models import tiny_model

SIZES: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "eos_token_id": 2,
}


def windowed() -> Any:
    return transformers.MistralForCausalLM(transformers.MistralConfig(**SIZES, sliding_window=8))


def dynamic() -> Any:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    config = transformers.LlamaConfig(**SIZES, max_position_embeddings=32, rope_parameters=rope)
    return transformers.LlamaForCausalLM(config)


def bidirectional() -> Any:
    return transformers.BertForMaskedLM(transformers.BertConfig(**SIZES))


def two_stacks() -> Any:
    config = transformers.T5Config(vocab_size=32, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
    return transformers.T5ForConditionalGeneration(config)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (windowed, "MistralForCausalLM: layers with a window of 8 tokens"),
        (dynamic, "LlamaForCausalLM: rotary frequencies that depend on the length"),
        (bidirectional, "BertForMaskedLM: a model that reads in both directions"),
        (two_stacks, "T5ForConditionalGeneration: an encoder-decoder"),
    ],
)
def test_models(make: Callable[[], Any], reason: str) -> None:
    model = make().eval()
    fastprefix.attach(model, PrefixConfig(3))
    with pytest.raises(ValueError, match=reason):
        enable_continuous_batching(model)


PREFIXES: dict[str, tuple[Any, str]] = {
    "gated": (PrefixConfig(3, gate="tanh"), "whose output is added to the content's"),
    "adapter": (LlamaAdapterConfig(3), "whose output is added to the content's"),
    "memory": (PrefixMemoryConfig(), "whose output is added to the content's"),
    "biased": (PrefixConfig(3, prefix_bias=True), "with biases"),
    "some_layers": (PrefixConfig(3, layers=[1]), "of some layers"),
    "in_place": (PrefixConfig(3, position_offset="none"), "position_offset='none'"),
    "after": (PromptConfig(3, place="after"), "place='after'"),
    "head": (PrefixConfig(3, modules_to_save=["lm_head"]), r"with modules_to_save \(lm_head\)"),
}


def test_prefixes() -> None:
    model = tiny_model()
    for name, (config, _) in PREFIXES.items():
        fastprefix.attach(model, config, name)
    fastprefix.attach(model, PrefixConfig(3, init=init.normal(0.8)))
    fastprefix.set_prefix(model, None)
    with engine(model) as manager:
        for name, (_, reason) in PREFIXES.items():
            with pytest.raises(ValueError, match=reason):
                manager.add_request([5, 6], prefix=name)
        (output,) = manager.generate([[5, 6]], ["default"])  # the engine goes on
    assert output.generated_tokens == alone(model, [5, 6], "default")
    fastprefix.set_prefix(model, "gated")
    want = model(torch.tensor([[5, 6]])).logits
    with pytest.raises(ValueError, match="whose output is added"), engine(model):
        pass
    assert torch.equal(model(torch.tensor([[5, 6]])).logits, want)


def test_requests() -> None:
    model = with_prefixes()
    with engine(model, blocks=10) as manager:
        for ids in ([-5, 6], [5, 32], []):
            with pytest.raises(ValueError, match=r"input_ids: got .*each from 0 to 31"):
                manager.add_request(ids, prefix="p21")
        with pytest.raises(ValueError, match="got 40 tokens of a prefix, 2 of a text and 500 new ones"):
            manager.add_request([5, 6], prefix="p40", max_new_tokens=500)
        with pytest.raises(ValueError, match="got 'unknown', expected None or one of"):
            manager.generate([[5, 6], [5, 6]], ["p21", "unknown"])
        with pytest.raises(ValueError, match="prefixes: got 1 names, expected one for each of 2 prompts"):
            manager.generate([[5, 6], [5, 6]], ["p21"])
        (output,) = manager.generate([[5, 6]], ["p21"])
    assert output.generated_tokens == alone(model, [5, 6], "p21")
    assert manager.add_request([5, 6], prefix="p21") is None  # as in transformers, once the engine has stopped
    with pytest.raises(RuntimeError, match="the engine's thread has ended"):
        manager.generate([[5, 6]], ["p21"])


def test_other_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "5.24.1")  # replaced by itself once it is used
    with pytest.raises(ValueError, match=r"transformers: got version 5\.24\.1, expected 5\.23\.0"):
        enable_continuous_batching(with_prefixes())


def test_engines() -> None:
    model = with_prefixes()
    fastprefix.set_prefix(model, "p3")
    with pytest.raises(ValueError, match="allow_block_sharing: got False"), engine(model, allow_block_sharing=False):
        pass
    with pytest.raises(ValueError, match="max_resident: got 0"):
        enable_continuous_batching(model, max_resident=0)
    with fastprefix.prefix_batch(model, ["p3"]), pytest.raises(ValueError, match="inside a block"), engine(model):
        pass
    with engine(model), pytest.raises(ValueError, match="with a manager, expected one at a time"):
        model.init_continuous_batching()
    options: dict[str, Any] = {"generation_config": transformers.GenerationConfig(max_new_tokens=2, eos_token_id=2)}
    options["continuous_batching_config"] = transformers.ContinuousBatchingConfig(num_blocks=20)
    with pytest.raises(ValueError, match="persistent_manager: got True"):
        model.generate_batch([[5, 6]], persistent_manager=True, **options)
    assert alone(model, [5, 6], "p3") == alone(with_prefixes(), [5, 6], "p3")
    with pytest.raises(ValueError, match="without a prefix"):
        enable_continuous_batching(tiny_model())
    fastprefix.detach(model)
    assert "init_continuous_batching" not in vars(model)


def test_a_broken_engine_gives_the_model_back(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An error while the cache is made leaves the active prefix active."""
    from fastprefix.serving.continuous_batching import manager

    model = with_prefixes()
    fastprefix.set_prefix(model, "p3")
    want = model(torch.tensor([[5, 6]])).logits

    def broken(*args: Any) -> Any:
        raise MemoryError("no pages")

    monkeypatch.setattr(manager, "PrefixPages", broken)
    with pytest.raises(MemoryError, match="no pages"), engine(model):
        pass
    assert torch.equal(model(torch.tensor([[5, 6]])).logits, want)
