"""Dropout of prefix tokens, which frozen ones outlive, and a start of values at zero."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import fastprefix
from fastprefix import PrefixConfig, PromptConfig, init
from tests.model_zoo.architectures import ROWS, VOCAB

IDS = torch.arange(3, 27).view(3, 8) % VOCAB


def attached(P: int = 6, **fields: Any) -> tuple[Any, Any]:
    model = ROWS["llama_gqa"].build(torch.float64)
    config = PrefixConfig(P, **{"init": init.normal(0.5), **fields})
    return model, fastprefix.attach(model, config).to(torch.float64)


@pytest.mark.parametrize("gate", [None, "linear"])
def test_a_step_is_one_of_the_prefix_without_the_dropped_tokens(gate: Any) -> None:
    """And the dropped tokens get no gradient, while frozen ones are always read."""
    model, prefix = attached(dropout=0.5, num_frozen_tokens=1, gate=gate, position_offset="none")
    if gate is not None:
        for layer in prefix.layers:
            layer.gate.weight.data.fill_(0.7)
    model.train()
    torch.manual_seed(5)
    stays = [torch.rand(6) >= 0.5 for _ in prefix.layers]  # what the layers draw, in their order
    for each in stays:
        each[0] = True
    assert not all(bool(each.all()) for each in stays)
    torch.manual_seed(5)
    got = model(input_ids=IDS)[0]
    got.square().sum().backward()
    for layer, each in zip(prefix.layers, stays, strict=True):
        assert torch.equal(layer.k.grad.abs().sum((0, 2)) > 0, each[1:])
    whole = list(prefix.key_values())
    assert all(k.shape[1] == 6 for k, _ in whole)
    fastprefix.set_prefix(model, None)
    with fastprefix.prefix_batch(model, ["default"] * 3):
        torch.manual_seed(5)
        torch.testing.assert_close(model(input_ids=IDS)[0], got)
    if gate is not None:
        return
    fastprefix.detach(model)
    model.eval()
    # The same keys and values, a prefix for each layer.
    kept = [(k.detach()[:, each], v.detach()[:, each]) for (k, v), each in zip(whole, stays, strict=True)]
    for i, (k, v) in enumerate(kept):
        config = PrefixConfig(k.shape[1], layers=[i], init=init.kv([k], [v]), position_offset="none")
        fastprefix.attach(model, config, f"layer{i}").to(torch.float64)
    with fastprefix.prefix_batch(model, [tuple(f"layer{i}" for i in range(len(kept)))]):
        torch.testing.assert_close(model(input_ids=IDS)[0], got, rtol=1e-5, atol=1e-6)  # starts are fp32


def test_evaluation_reads_all_tokens_and_saving_keeps_them(tmp_path: Path) -> None:
    model, prefix = attached(dropout=0.9)
    want = model(input_ids=IDS)[0]
    _, plain = attached()
    for mine, other in zip(prefix.parameters(), plain.parameters(), strict=True):
        mine.data.copy_(other.data.float())
    want = model(input_ids=IDS)[0]
    model.train()
    assert not torch.allclose(model(input_ids=IDS)[0], want)
    fastprefix.save(model, tmp_path)
    fastprefix.detach(model)
    model.eval()
    loaded: Any = fastprefix.load(model, tmp_path)
    assert loaded.config.dropout == 0.9
    loaded.to(torch.float64)
    torch.testing.assert_close(model(input_ids=IDS)[0], want)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("projected", [False, True])
def test_a_checkpointed_step_draws_the_same_tokens(reentrant: bool, projected: bool) -> None:
    fields: dict[str, Any] = {"prefix_projection": True, "init": init.normal()} if projected else {}
    model, prefix = attached(dropout=0.5, **fields)
    model.train()
    torch.manual_seed(5)
    model(input_ids=IDS)[0].square().sum().backward()
    want = [p.grad.clone() for p in prefix.parameters()]
    prefix.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    torch.manual_seed(5)
    model(input_ids=IDS)[0].square().sum().backward()
    for parameter, grad in zip(prefix.parameters(), want, strict=True):
        torch.testing.assert_close(parameter.grad, grad)


def test_a_soft_prompt_is_shared_next_to_a_prefix_with_dropout(recwarn: pytest.WarningsRecorder) -> None:
    """The prefix's dropout is none of the model's own."""
    model, _ = attached(dropout=0.5)
    fastprefix.attach(model, PromptConfig(3), "prompt").to(torch.float64)
    model.train()
    model(input_ids=IDS)
    assert not [w for w in recwarn if "concatenated" in str(w.message)]


@pytest.mark.parametrize("projected", [False, True])
def test_values_of_zero_and_keys_that_are_not(projected: bool) -> None:
    model, prefix = attached(init=init.zero(), prefix_projection=projected)
    for k, v in prefix.key_values():
        assert v.abs().max() < 1e-5 and k.std() > 0.01
    model(input_ids=IDS)[0].square().sum().backward()
    if not projected:
        for layer in prefix.layers:
            grad = layer.v.grad
            assert bool((layer.k.grad != 0).all()) and not torch.allclose(grad[:, 0], grad[:, 1])


def test_wrong_calls_are_refused() -> None:
    for p in (1.0, -0.1, True, "a"):
        with pytest.raises(ValueError, match=r"dropout: got .*, expected a number from 0 to below 1"):
            PrefixConfig(4, dropout=p)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="init: got 'zero'"):
        PromptConfig(4, init=init.zero())
    with pytest.raises(ValueError, match="std: got 0, expected a positive number"):
        init.zero(0)
