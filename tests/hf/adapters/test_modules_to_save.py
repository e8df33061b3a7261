"""Modules trained beside a prefix: one for each prefix and row, also inside checkpointed layers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastprefix
from fastprefix import PrefixConfig, init
from tests.model_zoo.trained_heads import ids, model, out

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

P, VOCAB = 3, 40


def test_every_prefix_has_its_own_head(tmp_path: Path) -> None:
    one = model()
    bare = out(one)
    want: dict[str | None, Tensor] = {None: bare}
    parameters = []
    for seed, name in enumerate(("a", "b")):
        prefix = fastprefix.attach(one, PrefixConfig(P, init=init.normal(0.5), modules_to_save=["score"]), name)
        torch.manual_seed(seed)
        torch.nn.init.normal_(one.score.weight)
        parameters += list(prefix.parameters())
        want[name] = out(one)
        fastprefix.save(one, tmp_path / name, name)
    listed = [id(p) for p in one.parameters()]
    assert len(listed) == len(set(listed)) and {id(p) for p in parameters} <= set(listed)
    assert len({x.data_ptr() for x in one.state_dict().values()}) == len(one.state_dict())
    copied = copy.deepcopy(one)
    for m in (one, copied):
        for name in ("a", None, "b", "a"):
            fastprefix.set_prefix(m, name)
            torch.testing.assert_close(out(m), want[name], rtol=0, atol=1e-12)
        names = ["b", None, "a", "b"]
        with fastprefix.prefix_batch(m, names):
            rows = out(m)
        torch.testing.assert_close(rows, torch.stack([want[n][i] for i, n in enumerate(names)]), rtol=0, atol=1e-12)
        with fastprefix.prefix_batch(m, ["b"]):
            torch.testing.assert_close(out(m), want["b"], rtol=0, atol=1e-12)
        torch.testing.assert_close(out(m), want["a"], rtol=0, atol=1e-12)
    shelf = model(seed=8)
    fastprefix.register(shelf, {name: tmp_path / name for name in ("a", "b")}, max_resident=2)
    with fastprefix.prefix_batch(shelf, ["b", "a", "a", "b"]):
        rows = out(shelf)
    torch.testing.assert_close(rows, torch.stack([want[n][i] for i, n in enumerate("baab")]), rtol=0, atol=1e-12)
    fastprefix.set_prefix(shelf, "b")
    torch.testing.assert_close(out(shelf), want["b"], rtol=0, atol=1e-12)
    fastprefix.set_prefix(shelf, None)
    torch.testing.assert_close(out(shelf), out(model(seed=8)), rtol=0, atol=1e-12)


def test_rows_train_their_own_heads() -> None:
    one = model()
    prefixes = [
        fastprefix.attach(one, PrefixConfig(P, modules_to_save=["score"]), name).requires_grad_() for name in "ab"
    ]
    labels = torch.tensor([0, 1, 2, 0])
    with fastprefix.prefix_batch(one, ["a", "b", "a", "b"]):
        one(input_ids=ids(), labels=labels).loss.backward()
    got = [prefix.modules_to_save.named()["score"].weight.grad.clone() for prefix in prefixes]
    for prefix, name, rows in zip(prefixes, "ab", ([0, 2], [1, 3]), strict=True):
        one.zero_grad()
        fastprefix.set_prefix(one, name)
        (one(input_ids=ids()[rows], labels=labels[rows]).loss / 2).backward()
        weight = prefix.modules_to_save.named()["score"].weight
        torch.testing.assert_close(got.pop(0), weight.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("reentrant", [True, False])
def test_modules_inside_checkpointed_layers(reentrant: bool, tmp_path: Path) -> None:
    def run(checkpointed: bool) -> dict[str, Tensor]:
        torch.manual_seed(0)
        one = model("LlamaForCausalLM")
        prefix = fastprefix.attach(one, PrefixConfig(P, modules_to_save=["0.input_layernorm", "0.mlp"]), "a")
        fastprefix.attach(one, PrefixConfig(P), "b")
        fastprefix.set_prefix(one, "a")
        with torch.no_grad():
            one.model.layers[0].mlp.up_proj.weight.mul_(1.5)
        one.train()
        if checkpointed:
            one.gradient_checkpointing_enable({"use_reentrant": reentrant})
        loss = one(input_ids=ids(), labels=ids()).loss
        fastprefix.set_prefix(one, "b")  # between a forward and its backward
        loss.backward()
        if not checkpointed:
            fastprefix.save(one, tmp_path, "a")
            fresh = model("LlamaForCausalLM")
            fastprefix.load(fresh, tmp_path)
            fastprefix.set_prefix(one, "a")
            assert torch.equal(fresh(input_ids=ids()).logits, one(input_ids=ids()).logits)
        return {name: p.grad for name, p in prefix.named_parameters()}

    want, got = run(False), run(True)
    for name, grad in want.items():
        torch.testing.assert_close(got[name], grad, rtol=0, atol=1e-12)


def test_rows_generate_with_their_own_heads() -> None:
    one = model("LlamaForCausalLM")
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "num_beams": 2}
    want = {}
    for seed, name in enumerate("ab"):
        fastprefix.attach(one, PrefixConfig(P, init=init.normal(0.5), modules_to_save=["lm_head"]), name)
        torch.manual_seed(seed)
        torch.nn.init.normal_(one.lm_head.weight)
        want[name] = one.generate(ids(), **options)
    with fastprefix.prefix_batch(one, list("abba")):
        got = one.generate(ids(), **options)
    assert torch.equal(got, torch.stack([want[name][i] for i, name in enumerate("abba")]))
