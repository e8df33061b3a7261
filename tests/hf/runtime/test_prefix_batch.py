"""``prefix_batch`` and ``register``: a prefix for every row, equal to separate runs; a thousand of them on disk."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastprefix
from fastprefix import PrefixConfig, PromptConfig, init
from fastprefix.hf.adapters.lookup import require_installation
from tests.model_zoo.architectures import ROWS, VOCAB

S = 6
NAMES = ["a", None, "long", "a", "prompt", "some", "mlp"]


def tokens(batch: int) -> Tensor:
    return torch.randint(3, VOCAB, (batch, S), generator=torch.Generator().manual_seed(3))


def banked(name: str = "llama_gqa", dtype: torch.dtype = torch.float64) -> Any:
    model = ROWS[name].build(dtype)
    configs: dict[str, PrefixConfig | PromptConfig] = {
        "a": PrefixConfig(2, init=init.normal(0.5)),
        "long": PrefixConfig(11, init=init.normal(0.5), position_offset="none"),
        "prompt": PromptConfig(4),
        "some": PrefixConfig(3, init=init.normal(0.5), layers=[1]),
        "mlp": PrefixConfig(5, prefix_projection=True),
    }
    for key, config in configs.items():
        fastprefix.attach(model, config, key).to(dtype)
    return model


def alone(model: Any, name: str | None, call: Any) -> Any:
    fastprefix.set_prefix(model, name)
    try:
        return call()
    finally:
        fastprefix.set_prefix(model, None)


@pytest.mark.parametrize("name", ["llama_gqa", "gpt2", "phi"])
@pytest.mark.parametrize("padded", [False, True])
def test_equals_separate_runs(name: str, padded: bool) -> None:
    model, ids = banked(name), tokens(len(NAMES))
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :2] = mask[2, :3] = mask[4, :1] = 0  # not the bare model's row: GPT-2 alone counts padding
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, 0] = -100
    labels[:, 1:][mask.diff(dim=1) == 1] = -100
    fastprefix.set_prefix(model, None)
    own = [p for p in model.parameters() if p.requires_grad]
    count = (labels[:, 1:] != -100).sum()
    want, losses = [], []
    for i, key in enumerate(NAMES):

        def run(i: int = i) -> Any:
            return model(input_ids=ids[i : i + 1], attention_mask=mask[i : i + 1], labels=labels[i : i + 1])

        out = alone(model, key, run)
        want.append(out.logits)
        losses.append(out.loss * (labels[i, 1:] != -100).sum())
    total = sum(losses) / count
    grads = torch.autograd.grad(total, own)
    with fastprefix.prefix_batch(model, NAMES):
        got = model(input_ids=ids, attention_mask=mask, labels=labels)
    real = mask.bool()
    torch.testing.assert_close(got.logits[real], torch.cat(want)[real], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got.loss, total, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(torch.autograd.grad(got.loss, own), grads, rtol=1e-6, atol=1e-6)
    assert all(g.abs().max() > 0 for g in grads)


def test_a_prompt_predicts_its_row_s_first_token_and_nothing_else_does() -> None:
    model, ids = banked(), tokens(2)
    fastprefix.set_prefix(model, None)
    with torch.no_grad():
        first = alone(model, "a", lambda: model(input_ids=ids[:1], labels=ids[:1]).loss)
        second = alone(model, "prompt", lambda: model(input_ids=ids[1:], labels=ids[1:]).loss)
        with fastprefix.prefix_batch(model, ["a", "prompt"]):
            got = model(input_ids=ids, labels=ids).loss
    torch.testing.assert_close(got, (first * (S - 1) + second * S) / (2 * S - 1))


def test_a_row_without_a_prompt_keeps_its_loss_behind_padding() -> None:
    model, ids = banked(), tokens(2)
    fastprefix.set_prefix(model, None)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    labels = ids.masked_fill(mask == 0, -100)
    with torch.no_grad():
        options = {"attention_mask": mask[:1], "labels": labels[:1]}
        first = alone(model, "a", lambda: model(input_ids=ids[:1], **options).loss)
        second = alone(model, "prompt", lambda: model(input_ids=ids[1:], labels=ids[1:]).loss)
        with fastprefix.prefix_batch(model, ["a", "prompt"]):
            got = model(input_ids=ids, attention_mask=mask, labels=labels).loss
    torch.testing.assert_close(got, (first * (S - 2) + second * S) / (2 * S - 2))


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_return_sequences": 2, "num_beams": 2}], ids=str)
def test_generates(options: dict[str, Any]) -> None:
    model, ids = banked(), tokens(len(NAMES))
    fastprefix.set_prefix(model, None)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, **options}
    want = [alone(model, key, lambda i=i: model.generate(ids[i : i + 1], **options)) for i, key in enumerate(NAMES)]
    with fastprefix.prefix_batch(model, NAMES):
        got = model.generate(ids, **options)
    torch.testing.assert_close(got, torch.cat(want))


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant: bool) -> None:
    model, ids = banked(), tokens(len(NAMES))
    own = [p for p in model.parameters() if p.requires_grad]
    model.train()
    with fastprefix.prefix_batch(model, NAMES):
        model(input_ids=ids, labels=ids).loss.backward()
    want = [p.grad.clone() for p in own]
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    with fastprefix.prefix_batch(model, NAMES):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    torch.testing.assert_close([p.grad for p in own], want)


def test_nothing_is_padded_to_the_longest_or_copied_for_a_row() -> None:
    model, ids = banked("llama_mha", torch.float32), tokens(24)
    slot = require_installation(model).slots[0]
    seen = []
    give = slot.set_override
    slot.set_override = lambda kv: (seen.append(kv), give(kv))  # type: ignore[method-assign]
    with torch.no_grad(), fastprefix.prefix_batch(model, ["a", "long"] * 12):
        model(input_ids=ids)
    assert seen[0].k.shape[1] == 2 + 11 and seen[0].lens.tolist() == [2, 11] and seen[0].ids.tolist() == [0, 1] * 12


@pytest.mark.parametrize("reentrant", [True, False])
def test_the_bare_model_under_checkpointing_is_bare(reentrant: bool) -> None:
    model, ids = banked(), tokens(2)
    model.train()
    want = alone(model, None, lambda: model(input_ids=ids, use_cache=False).logits)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    fastprefix.set_prefix(model, "a")
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    with fastprefix.prefix_batch(model, [None, None]):
        torch.testing.assert_close(model(input_ids=ids, use_cache=False).logits, want, rtol=0, atol=0)


def test_an_interrupt_leaves_nothing_behind() -> None:
    model, ids = banked(), tokens(2)
    fastprefix.set_prefix(model, "a")
    want = model(input_ids=ids).logits

    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    handle = model.model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt), fastprefix.prefix_batch(model, ["long", "long"]):
        model(input_ids=ids)
    handle.remove()
    torch.testing.assert_close(model(input_ids=ids).logits, want, rtol=0, atol=0)


def test_a_copy_made_inside_a_block_is_outside_of_it() -> None:
    model, ids = banked(), tokens(2)
    fastprefix.set_prefix(model, "a")
    want = model(input_ids=ids).logits
    with fastprefix.prefix_batch(model, ["long", None]):
        twin = copy.deepcopy(model)
        with pytest.raises(ValueError, match="name: got 'a' inside a block of prefix_batch"):
            fastprefix.set_prefix(model, "a")
    torch.testing.assert_close(twin(input_ids=ids).logits, want, rtol=0, atol=0)


def test_wrong_calls() -> None:
    model = banked()
    with (
        pytest.raises(ValueError, match=r"names: got 'b', expected None or one of \['a', 'long'"),
        fastprefix.prefix_batch(model, ["a", "b"]),
    ):
        pass
    with pytest.raises(ValueError, match=r"names: got 'a', expected a list"), fastprefix.prefix_batch(model, "a"):
        pass
    with (
        pytest.raises(ValueError, match=r"names: got 2 names, expected one for each of the batch's 3 rows"),
        fastprefix.prefix_batch(model, ["a", "long"]),
    ):
        model(input_ids=tokens(3))
    with (
        pytest.raises(ValueError, match=r"model: got LlamaForCausalLM without a prefix"),
        fastprefix.prefix_batch(ROWS["llama_gqa"].build(), ["a"]),
    ):
        pass


def stored(tmp_path: Path, count: int) -> dict[str, Path]:
    model = ROWS["llama_gqa"].build()
    for i in range(count):
        torch.manual_seed(i)
        fastprefix.attach(model, PrefixConfig(1 + i % 5, init=init.normal(0.5)), f"p{i}")
        fastprefix.save(model, tmp_path / f"p{i}", f"p{i}")
        fastprefix.detach(model)
    return {f"p{i}": tmp_path / f"p{i}" for i in range(count)}


def test_a_thousand_prefixes_few_of_them_in_memory(tmp_path: Path) -> None:
    few = stored(tmp_path, 7)
    model, ids = ROWS["llama_gqa"].build(), tokens(4)
    fastprefix.register(model, {f"{key}-{i}": path for i in range(143) for key, path in few.items()}, max_resident=4)
    source: Any = require_installation(model).selection.provider
    assert len(source.names()) == 1001 and not source.registry.resident
    for start in range(0, 1000, 97):
        names = [f"p{(start + j) % 7}-{(start + j) % 143}" for j in range(4)]
        with torch.no_grad(), fastprefix.prefix_batch(model, names):
            got = model(input_ids=ids).logits
        assert len(source.registry.resident) <= 4
        for row, name in enumerate(names):
            other = ROWS["llama_gqa"].build()
            fastprefix.load(other, few[name.split("-")[0]])
            torch.testing.assert_close(got[row], other(input_ids=ids[row : row + 1]).logits[0], rtol=1e-4, atol=1e-5)
    fastprefix.set_prefix(model, "p3-5")
    fastprefix.load(other := ROWS["llama_gqa"].build(), few["p3"])
    torch.testing.assert_close(model(input_ids=ids).logits, other(input_ids=ids).logits, rtol=1e-4, atol=1e-5)
    assert not any(p.requires_grad for p in model.parameters())
    with (
        pytest.raises(ValueError, match=r"names: got 5 prefixes from disk, expected at most max_resident = 4"),
        fastprefix.prefix_batch(model, [f"p{i}-0" for i in range(5)]),
    ):
        pass


def test_what_cannot_be_registered(tmp_path: Path) -> None:
    model = ROWS["llama_gqa"].build()
    with pytest.raises(ValueError, match=r"dirs: got .*nowhere for 'a', expected a folder"):
        fastprefix.register(model, {"a": tmp_path / "nowhere"})
    assert not hasattr(model, "_fastprefix")
    with pytest.raises(ValueError, match=r"max_resident: got 0"):
        fastprefix.register(model, {}, max_resident=0)
    few = stored(tmp_path, 1)
    fastprefix.register(model, few)
    with pytest.raises(ValueError, match=r"dirs: got 'p0', which is taken"):
        fastprefix.register(model, few)
    with pytest.raises(ValueError, match=r"name: got 'p0', expected a new one"):
        fastprefix.attach(model, PrefixConfig(2), "p0")
