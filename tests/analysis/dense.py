"""What analyses are judged by, in fp64: whole attention matrices of explicit concatenation."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

import fastprefix
from fastprefix import PrefixConfig
from tests.model_zoo import encoder_decoders
from tests.model_zoo.architectures import ROWS
from tests.model_zoo.inputs import P, inputs, positions
from tests.support.concat_oracle import Weights, run_concat, weights
from tests.support.model_error_rule import StayingInDouble

# Of the operator's arguments each is used by one of these.
NAMES = ("llama_gqa", "gpt2", "gemma2", "mistral_window", "gpt_oss", "deepseek_v3", "smollm3", "bert")
CASES = [(name, padding) for name in NAMES for padding in ("none", "left", "right")]
TOLERANCE = {"rtol": 0.0, "atol": 1e-9}


def attached(name: str, **options: Any) -> tuple[Any, dict[str, tuple[Tensor, ...]]]:
    """A model in fp64 with a random prefix, and its numbers by the attention module's name."""
    model = ROWS[name].build(torch.float64)
    config = PrefixConfig(P, init=fastprefix.init.normal(0.6), **options)
    prefix = fastprefix.attach(model, config).double()
    pairs = encoder_decoders.key_values(model, prefix)
    biases = prefix.biases()
    if biases is None:
        return model, pairs
    with torch.no_grad():
        for bias in biases:
            bias.normal_()
    return model, {at: (*pair, bias.detach()) for (at, pair), bias in zip(pairs.items(), biases, strict=True)}


@contextmanager
def in_double() -> Iterator[None]:
    """Models that take norms or angles to fp32 stay in fp64, so that two runs differ by fp64's rounding alone."""
    with StayingInDouble(), torch.no_grad():
        yield


def dense(model: Any, pairs: Mapping[str, tuple[Tensor, ...]], batch: dict[str, Tensor], name: str) -> list[Weights]:
    """Every layer's attention over prefix and content, by concatenation."""
    with weights() as found, in_double():
        run_concat(bare(model), pairs, **batch, **(positions(name, batch) if pairs else {}))
    return found


def bare(model: Any) -> Any:
    """A copy without anything of ours."""
    twin = copy.deepcopy(model)
    fastprefix.detach(twin)
    return twin


def batch_of(name: str, padding: str) -> tuple[dict[str, Tensor], Tensor]:
    """A batch, and which of its tokens ``[B, S]`` are real."""
    batch = inputs(name, padding)
    mask = batch.get("attention_mask")
    return batch, torch.ones_like(batch["input_ids"]).bool() if mask is None else mask.bool()


def rows(x: Tensor, real: Tensor) -> Tensor:
    """``[B, H, S, ...] -> [H, n, ...]``."""
    return x.transpose(1, 2)[real].transpose(0, 1)
