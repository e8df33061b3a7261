"""Tiny models with prefixes, what ``attach`` makes of a prompt alone, and an engine for them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

import fastprefix
from fastprefix import PrefixConfig, PromptConfig, init
from fastprefix.serving.continuous_batching import enable_continuous_batching
from tests.support.tiny_models import tiny_model

PAGE, NEW = 16, 8
START = init.normal(0.8)


def with_prefixes(model: Any = None, lengths: Sequence[int] = (3, 16, 21, 40)) -> Any:
    """A model with prefixes ``p<P>``, one through an MLP and a soft prompt; none of them is active."""
    model = tiny_model() if model is None else model
    torch.manual_seed(3)
    for tokens in lengths:
        fastprefix.attach(model, PrefixConfig(tokens, init=START), f"p{tokens}")
    fastprefix.attach(model, PrefixConfig(5, init=START, prefix_projection=True), "projected")
    fastprefix.attach(model, PromptConfig(18, init=START), "prompt")
    fastprefix.set_prefix(model, None)
    return model


def prompts(number: int, longest: int = 30, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest, (number,), generator=generator)
    return [torch.randint(3, 32, (int(n),), generator=generator).tolist() for n in lengths]


def alone(model: Any, ids: Sequence[int], name: Any, tokens: int = NEW, **options: Any) -> list[int]:
    """The greedy tokens that ``generate`` gives for one prompt and its prefix, without the engine."""
    with fastprefix.prefix_batch(model, [name]):
        made = model.generate(torch.tensor([ids]), max_new_tokens=tokens, do_sample=False, **options)
    found: list[int] = made[0, len(ids) :].tolist()
    return found


@contextmanager
def engine(
    model: Any, tokens: int = NEW, blocks: int = 200, generation: Any = None, resident: int = 32, **options: Any
) -> Iterator[Any]:
    from transformers import ContinuousBatchingConfig, GenerationConfig

    generation = generation or GenerationConfig(max_new_tokens=tokens, do_sample=False, eos_token_id=2)
    config = ContinuousBatchingConfig(page_size=PAGE, num_blocks=blocks, max_batch_tokens=64, **options)
    enable_continuous_batching(model, max_resident=resident)
    with model.continuous_batching_context_manager(generation, continuous_batching_config=config) as manager:
        yield manager


def tokens_of(outputs: Sequence[Any]) -> list[list[int]]:
    return [output.generated_tokens for output in outputs]
