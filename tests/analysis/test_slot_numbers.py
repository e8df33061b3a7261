"""Cosines, ranks and ties of slots equal their definitions; slots that do no work are warned of in training."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastprefix
from fastprefix import LlamaAdapterConfig, PrefixConfig, PromptConfig, analysis, init
from fastprefix.prefixes import slots as numbers
from tests.model_zoo.architectures import ROWS
from tests.support.cli_runs import make_folder, train
from tests.support.tiny_models import tiny_model


@pytest.mark.parametrize("shape", [(2, 3), (7, 40), (40, 7)])
def test_mean_cosine_and_effective_rank(shape: tuple[int, int]) -> None:
    x = torch.randn(shape, dtype=torch.float64) + 0.4
    each = torch.nn.functional.cosine_similarity(x[:, None], x, dim=2)
    off = ~torch.eye(len(x), dtype=torch.bool)
    assert abs(numbers.mean_cosine(x) - each[off].mean().item()) < 1e-12
    s = torch.linalg.eigvalsh(x @ x.T).clamp(min=0).sqrt()
    p = s / s.sum()
    p = p[p > 1e-7]
    assert abs(numbers.effective_rank(x) - (-(p * p.log()).sum()).exp().item()) < 1e-5
    assert abs(numbers.effective_rank(torch.eye(5)) - 5.0) < 1e-12
    assert abs(numbers.effective_rank(torch.ones(5, 3)) - 1.0) < 1e-9


def test_zeros_are_finite() -> None:
    zero = torch.zeros(3, 4)
    assert numbers.mean_cosine(zero) == 0.0 and numbers.effective_rank(zero) == 0.0
    assert numbers.tied(zero) == [(0, 1), (0, 2), (1, 2)]
    assert numbers.mean_cosine(zero[:1]) != numbers.mean_cosine(zero[:1])


@pytest.mark.parametrize("rows", [1, 2, 512])
def test_ties(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numbers, "_ROWS", rows)
    x = 100.0 * torch.randn(5, 8)
    x[4] = x[1] * (1 + 1e-6)
    assert numbers.tied(x) == [(1, 4)]
    assert numbers.tied(x, 1e-7) == []


def prefixed(config: Any = None) -> tuple[Any, Any]:
    model = tiny_model()
    return model, fastprefix.attach(model, config or PrefixConfig(4, init=init.normal(0.5)))


def test_geometry_reads_every_layer() -> None:
    model, prefix = prefixed()
    found = analysis.slot_geometry(model)
    for i, (k, v) in enumerate(prefix.key_values()):
        x = torch.cat([k.transpose(0, 1).flatten(1), v.transpose(0, 1).flatten(1)], 1).detach()
        assert abs(found.mean_cosine[i].item() - numbers.mean_cosine(x)) < 1e-12
        assert abs(found.effective_rank[i].item() - numbers.effective_rank(x)) < 1e-12
    assert found.tied == () and found.collapsed() == () and found.layers == (0, 1)
    with torch.no_grad():
        for layer in prefix.layers:
            layer.k[:, 2], layer.v[:, 2] = layer.k[:, 0], layer.v[:, 0]
    assert analysis.slot_geometry(model).tied == ((0, 2),)
    with torch.no_grad():  # in one layer they differ
        prefix.layers[1].v[:, 2] += 1.0
    assert analysis.slot_geometry(model).tied == ()
    with torch.no_grad():
        prefix.layers[0].k += 100.0
    assert analysis.slot_geometry(model).collapsed() == (0,)


@pytest.mark.parametrize("encoder", [None, "lstm"])
def test_geometry_of_a_soft_prompt(encoder: Any) -> None:
    model = ROWS["llama_gqa"].build()
    prompt = fastprefix.attach(model, PromptConfig(init=init.token_ids([9, 5, 9, 20]), encoder=encoder))
    found = analysis.slot_geometry(model)
    assert found.layers == (None,) and found.tied == ((0, 2),)
    assert abs(found.mean_cosine.item() - numbers.mean_cosine(prompt().detach())) < 1e-12


def test_without_gradient() -> None:
    _, prefix = prefixed(PrefixConfig(4, num_frozen_tokens=1, init=init.normal(0.5)))
    assert numbers.without_gradient(prefix) == []  # no backward yet
    for layer in prefix.layers:
        layer.k.grad, layer.v.grad = torch.randn_like(layer.k), torch.randn_like(layer.v)
        layer.k.grad[:, 1] *= 1e-9
        layer.v.grad[:, 1] *= 1e-9
    assert numbers.without_gradient(prefix) == [2]
    prefix.layers[1].v.grad[:, 1] = 1.0  # one layer reads it
    assert numbers.without_gradient(prefix) == []
    for layer in prefix.layers:  # gates at 0
        layer.k.grad.zero_(), layer.v.grad.zero_()
    assert numbers.without_gradient(prefix) == []


@pytest.mark.parametrize("config", [PromptConfig(4), LlamaAdapterConfig(4), PrefixConfig(4, prefix_projection=True)])
def test_without_gradient_of_other_kinds(config: Any) -> None:
    _, prefix = prefixed(config)
    own = [p for n, p in prefix.named_parameters() if n.endswith(("embedding", "prompt"))]
    for p in own:
        p.grad = torch.ones_like(p)
        p.grad[3] = 0.0
    assert numbers.without_gradient(prefix) == ([] if isinstance(config, PrefixConfig) else [3])


def trained(config: Any, spoil: Any, folder: Path) -> list[str]:
    """The warnings of a few steps."""
    from transformers import TrainingArguments

    from fastprefix.hf.trainer import PrefixTrainer

    model, prefix = prefixed(config)
    with torch.no_grad():
        spoil(prefix)
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, 32, (6, 7))]
    args = TrainingArguments(
        str(folder), max_steps=3, logging_steps=1, learning_rate=1e-3, report_to="none", disable_tqdm=True,
        save_strategy="no", use_cpu=True, per_device_train_batch_size=2,
    )  # fmt: skip
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        PrefixTrainer(model=model, args=args, train_dataset=rows).train()
    return [str(w.message) for w in found if "slots" in str(w.message)]


def dead(prefix: Any) -> None:
    for layer in prefix.layers:
        layer.bias[:, 2] = -1e4


def collapsed(prefix: Any) -> None:
    for layer in prefix.layers:
        layer.k += 50.0


def tie(prefix: Any) -> None:
    for layer in prefix.layers:
        layer.k[:, 3], layer.v[:, 3] = layer.k[:, 1], layer.v[:, 1]


CONFIG = {"num_virtual_tokens": 4, "init": init.normal(0.5)}
SPOILT = [
    ({"prefix_bias": True}, dead, r"1 of 4 slots \(2\) have had no gradient since the last log: no query attends"),
    ({}, collapsed, "the 4 slots have collapsed to one direction: their mean pairwise cosine is"),
    ({}, tie, "slots 1 and 3 are equal: equal slots get equal gradients"),
]


@pytest.mark.parametrize(("options", "spoil", "said"), SPOILT, ids=["dead", "collapsed", "tied"])
def test_the_trainer_warns_once(options: dict[str, Any], spoil: Any, said: str, tmp_path: Path) -> None:
    found = trained(PrefixConfig(**CONFIG, **options), spoil, tmp_path)
    assert len(found) == 1
    with pytest.raises(ValueError, match=said):
        raise ValueError(found[0])


def test_a_random_encoder_is_no_fault_before_it_trains(tmp_path: Path) -> None:
    """Its outputs are close to each other; of equal slots it is told at once."""
    from fastprefix.hf.adapters.lookup import require_installation
    from fastprefix.hf.trainer import SlotWarnings

    model, prefix = prefixed(PrefixConfig(**CONFIG))
    with torch.no_grad():
        collapsed(prefix)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SlotWarnings(require_installation(model)).on_train_begin(None, None, None)
    with torch.no_grad():
        tie(prefix)
    with pytest.warns(UserWarning, match="slots 1 and 3 are equal"):
        SlotWarnings(require_installation(model)).on_train_begin(None, None, None)


def test_the_trainer_is_silent_of_a_good_prefix(tmp_path: Path) -> None:
    assert trained(PrefixConfig(**CONFIG), lambda prefix: None, tmp_path) == []


def test_the_command_warns(tmp_path: Path) -> None:
    """Of a prompt that starts at one word again and again."""
    folder = make_folder(tmp_path)
    options = ["--method", "prompt", "--init-text", "grass", "--num-virtual-tokens", "4", "--max-steps", "2"]
    with pytest.warns(UserWarning, match=r"slots 0 and 2 .* are equal"):
        assert train(folder, *options) == 0


def test_vectors_are_of_all_heads() -> None:
    _, prefix = prefixed()
    layer = numbers.slots(prefix)[1]
    k, v = prefix.key_values()[1]
    want: Tensor = torch.cat([k[0, 3], k[1, 3], v[0, 3], v[1, 3]])
    assert layer.layer == 1 and torch.equal(layer.vectors[3], want.detach())
