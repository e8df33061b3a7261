"""A whole model in one folder: transformers reads the bare one without a complaint, fastprefix reads it all."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import fastprefix
from fastprefix import PrefixConfig, PromptConfig, init
from fastprefix.hf.adapters.lookup import require_installation
from fastprefix.hf.storage.atomic_folder import COMMIT, STAGING
from tests.support.fault_injection import at_step
from tests.support.saved_adapters import numbers, same
from tests.support.tiny_models import tiny_model

IDS = torch.arange(3, 12)[None]
INDEX = Path("fastprefix") / "prefixes.json"


def attached(seed: int = 0) -> Any:
    """A model with prefixes of several kinds, ``head`` active, whose head is its own."""
    torch.manual_seed(seed)
    model = tiny_model()
    fastprefix.attach(model, PrefixConfig(3, prefix_projection=True, encoder_hidden_size=5), "mlp")
    fastprefix.attach(model, PromptConfig(4, init=init.normal(0.5)), "prompt")
    fastprefix.attach(model, PromptConfig(4, init=init.normal(0.5), place="after"), "suffix")
    fastprefix.attach(model, PrefixConfig(3, init=init.normal(0.5), modules_to_save=["lm_head"]), "head")
    with torch.no_grad():
        model.lm_head.weight.add_(1.0)
    return model


def all_numbers(model: Any) -> dict[str, Tensor]:
    prefixes = require_installation(model).selection.prefixes
    return {f"{name}.{key}": x for name, prefix in prefixes.items() for key, x in numbers(prefix).items()}


def outputs(model: Any) -> dict[str | None, Tensor]:
    found: dict[str | None, Tensor] = {}
    active = require_installation(model).selection.active
    for name in (None, "mlp", "prompt", "suffix", "head"):
        fastprefix.set_prefix(model, name)
        found[name] = model(input_ids=IDS).logits.detach()
    fastprefix.set_prefix(model, active)
    return found


@pytest.mark.parametrize("size", ["50GB", 4000])
def test_there_and_back(size: Any, tmp_path: Path) -> None:
    model = attached()
    want, state = outputs(model), {name: x.clone() for name, x in model.state_dict().items()}
    fastprefix.save_pretrained(model, tmp_path, max_shard_size=size)
    shards = list(tmp_path.glob("model-*-of-*.safetensors"))
    assert bool(shards) == (size != "50GB") and (len(shards) > 1) == (size != "50GB")
    after = model.state_dict()
    assert list(after) == list(state) and all(torch.equal(after[name], x) for name, x in state.items())
    bare, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    torch.testing.assert_close(bare(input_ids=IDS).logits, tiny_model()(input_ids=IDS).logits)
    again = fastprefix.from_pretrained(tmp_path)
    assert type(again) is type(model) and not again.training
    installation = require_installation(again)
    assert list(installation.selection.prefixes) == ["mlp", "prompt", "suffix", "head"]
    assert installation.selection.active == "head" and same(all_numbers(again), all_numbers(model))
    assert {n for n, p in again.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    for name, x in outputs(again).items():
        torch.testing.assert_close(x, want[name])
    fastprefix.load(bare, tmp_path / "fastprefix" / "prompt", "mine")
    torch.testing.assert_close(bare(input_ids=IDS).logits, want["prompt"])


def test_a_later_save_leaves_nothing_of_an_earlier_one(tmp_path: Path) -> None:
    model = attached()
    fastprefix.save_pretrained(model, tmp_path, max_shard_size=4000)
    (tmp_path / "notes.txt").write_text("somebody's")
    (tmp_path / "fastprefix" / "head" / "README.md").write_text("my own words")
    fastprefix.detach(model, "prompt")
    fastprefix.set_prefix(model, None)
    fastprefix.save_pretrained(model, tmp_path)
    assert not list(tmp_path.glob("model-*")) and not (tmp_path / "model.safetensors.index.json").exists()
    assert not (tmp_path / "fastprefix" / "prompt").exists() and (tmp_path / "notes.txt").read_text() == "somebody's"
    assert (tmp_path / "fastprefix" / "head" / "README.md").read_text() == "my own words"
    assert not (tmp_path / STAGING).exists()
    again = require_installation(fastprefix.from_pretrained(tmp_path))
    assert list(again.selection.prefixes) == ["mlp", "suffix", "head"] and again.selection.active is None


def full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def killed() -> None:
    raise KeyboardInterrupt


@pytest.mark.slow
@pytest.mark.parametrize("act", [full, killed])
def test_all_or_nothing(act: Callable[[], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At every seventeenth step of a save: transformers finds nothing or one of the two, fastprefix one of the two."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    old, new = attached(1), tiny_model()
    with torch.no_grad():
        new.lm_head.weight.neg_()
    fastprefix.attach(new, PrefixConfig(3, init=init.normal(0.5)), "mlp")
    before, after = all_numbers(old), all_numbers(new)
    head = {True: tiny_model().lm_head.weight, False: -tiny_model().lm_head.weight}
    seen = []
    for step in itertools.count(2, 17):
        folder = tmp_path / str(step)
        fastprefix.save_pretrained(old, folder)
        with at_step(step, act) as count, contextlib.suppress(OSError, KeyboardInterrupt):
            fastprefix.save_pretrained(new, folder)
        if (folder / "config.json").exists():
            bare = transformers.AutoModelForCausalLM.from_pretrained(folder)
            finished = not (folder / "fastprefix" / "prompt" / "adapter_config.json").exists()
            assert torch.equal(bare.lm_head.weight, head[not finished])
        found = fastprefix.from_pretrained(folder)
        is_old = same(all_numbers(found), before)
        assert is_old or same(all_numbers(found), after)
        fastprefix.set_prefix(found, None)
        assert torch.equal(found.lm_head.weight, head[is_old]) and not (folder / STAGING / COMMIT).exists()
        seen.append(is_old)
        if count[0] < step:
            break
    assert seen == sorted(seen, reverse=True) and seen[0] and not seen[-1]


def changed(folder: Path, **fields: Any) -> None:
    index = json.loads((folder / INDEX).read_text())
    (folder / INDEX).write_text(json.dumps({**index, **fields}))


WRONG: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no prefixes": (lambda f: (f / INDEX).unlink(), r"dir: got no file .*prefixes.json"),
    "no prefix": (lambda f: (f / "fastprefix/mlp/adapter_config.json").unlink(), r"dir: got no file .*adapter_config"),
    "a name outside": (lambda f: changed(f, prefixes=["../x"]), r"prefixes.json: prefixes: got \['../x'\]"),
    "a number": (lambda f: changed(f, prefixes=[3]), r"prefixes.json: prefixes: got \[3\]"),
    "another active": (lambda f: changed(f, active="x"), r"prefixes.json: active: got 'x', expected None or one of"),
    "another version": (lambda f: changed(f, format_version=2), r"format_version: got 2, expected 1"),
    "no class": (
        lambda f: (f / "config.json").write_text('{"model_type": "llama", "architectures": ["Mine"]}'),
        r"model_class: got None, where .*config.json names 'Mine'",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_refused(what: str, tmp_path: Path) -> None:
    fastprefix.save_pretrained(attached(), tmp_path)
    change, message = WRONG[what]
    change(tmp_path)
    with pytest.raises(ValueError, match=message):
        fastprefix.from_pretrained(tmp_path)


def test_models_that_are_not_saved(tmp_path: Path) -> None:
    import peft

    with pytest.raises(ValueError, match="model: got LlamaForCausalLM without a prefix"):
        fastprefix.save_pretrained(tiny_model(), tmp_path)
    model = attached()
    fastprefix.save(model, tmp_path / "adapter", "mlp")
    with pytest.raises(ValueError, match=r"dir: got .*adapter, which holds an adapter"):
        fastprefix.save_pretrained(model, tmp_path / "adapter")
    with (
        fastprefix.prefix_batch(model, ["mlp"]),
        pytest.raises(ValueError, match="model: got one inside a block of prefix_batch or shared_prompt"),
    ):
        fastprefix.save_pretrained(model, tmp_path / "x")
    lora = peft.get_peft_model(tiny_model(), peft.LoraConfig(r=2, target_modules=["q_proj"])).get_base_model()
    fastprefix.attach(lora, PrefixConfig(3))
    with pytest.raises(ValueError, match="model: got LlamaForCausalLM with PEFT's adapters in it"):
        fastprefix.save_pretrained(lora, tmp_path / "x")
    with torch.no_grad():
        next(iter(require_installation(model).selection.prefixes["prompt"].parameters())).fill_(torch.nan)
    with pytest.raises(ValueError, match=r"prefix 'prompt'.*nan or infinite numbers"):
        fastprefix.save_pretrained(model, tmp_path / "nan")
    assert not any((tmp_path / "nan").iterdir())
