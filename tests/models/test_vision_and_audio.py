"""Models of images and sounds, which have neither token ids nor position ids."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import fastprefix
from fastprefix import PrefixConfig, PromptConfig
from fastprefix.hf.adapters.lookup import find_installation
from fastprefix.hf.storage.peft_format import CONFIG
from fastprefix.prefixes.init import Init
from tests.model_zoo.architectures import ROWS
from tests.model_zoo.inputs import P, inputs

NAMES = [name for name, row in ROWS.items() if row.content != "text"]
START = fastprefix.init.normal(0.6)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_shifted(name: str) -> None:
    """Positions belong to the content: position_offset has nothing to move."""
    model, batch = ROWS[name].build(), inputs(name, dtype=torch.float32)
    first = fastprefix.attach(model, PrefixConfig(P, init=START))
    want = model(**batch).last_hidden_state
    second = fastprefix.attach(model, PrefixConfig(P, position_offset="none"), name="unmoved")
    second.load_state_dict(first.state_dict())
    assert torch.equal(model(**batch).last_hidden_state, want)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("projected", [False, True])
def test_saved_and_loaded(name: str, projected: bool, tmp_path: Path) -> None:
    model, other, batch = ROWS[name].build(), ROWS[name].build(), inputs(name, dtype=torch.float32)
    fastprefix.attach(model, PrefixConfig(P, init=START, prefix_projection=projected))
    fastprefix.save(model, tmp_path)
    fastprefix.load(other, tmp_path)
    assert torch.equal(other(**batch).last_hidden_state, model(**batch).last_hidden_state)
    # PEFT would move content that cannot be moved, or fail on it later.
    assert json.loads((tmp_path / CONFIG).read_text())["peft_type"] == "FASTPREFIX"


@pytest.mark.parametrize("name", NAMES)
def test_a_prefix_for_each_row(name: str) -> None:
    model, batch = ROWS[name].build(), inputs(name, dtype=torch.float32)
    for n, tokens in (("a", P), ("b", 2)):
        fastprefix.attach(model, PrefixConfig(tokens, init=START), name=n)
    with fastprefix.prefix_batch(model, ["b", None, "a"]):
        mixed = model(**batch).last_hidden_state
    for i, n in enumerate(("b", None, "a")):
        fastprefix.set_prefix(model, n)
        torch.testing.assert_close(mixed[i], model(**batch).last_hidden_state[i], rtol=1e-4, atol=1e-5)


def test_under_a_head() -> None:
    """A classifier's loss reaches the prefix through the model inside it."""
    model = replace(ROWS["vit"], cls="ViTForImageClassification").build()
    prefix = fastprefix.attach(model, PrefixConfig(P, init=START))
    model(**inputs("vit", dtype=torch.float32), labels=torch.tensor([0, 1, 1])).loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in prefix.parameters())
    assert "vit" in fastprefix.explain(model) and f"P={P}" in fastprefix.explain(model)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("init", [fastprefix.init.token_ids([1, 2]), fastprefix.init.vocabulary()])
def test_no_start_from_tokens(name: str, init: Init) -> None:
    model = ROWS[name].build()
    with pytest.raises(ValueError, match=rf"init: got {init.name} for {ROWS[name].cls}, which reads .*normal or kv"):
        fastprefix.attach(model, PrefixConfig(P, init=init))
    assert find_installation(model) is None


@pytest.mark.parametrize("name", NAMES)
def test_no_prompts(name: str) -> None:
    model, error = ROWS[name].build(), rf"model: got {ROWS[name].cls}, which reads .*a model of input_ids"
    with pytest.raises(ValueError, match=error):
        fastprefix.attach(model, PromptConfig(P))
    with pytest.raises(ValueError, match=error), fastprefix.shared_prompt(model, [1, 2]):
        pass
    assert find_installation(model) is None and model.config._attn_implementation == "sdpa"


class Unmovable(transformers.BertModel):
    """A text model whose positions are its own affair."""

    def forward(self, input_ids: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        return super().forward(input_ids, attention_mask, **kwargs)


def test_positions_that_cannot_move() -> None:
    """An encoder counts its own positions from a prompt in front on; what is beside the rows, a prefix, moves none."""
    model = Unmovable(transformers.BertConfig(**ROWS["bert"].options)).eval()
    with pytest.raises(ValueError, match="model: got Unmovable, which does not run on inputs_embeds alone"):
        fastprefix.attach(model, PromptConfig(P))
    ids = torch.randint(3, 99, (2, 7))
    with torch.no_grad():
        want = model(torch.cat([torch.tensor([[1, 2]]).expand(2, -1), ids], 1)).last_hidden_state[:, 2:]
        with fastprefix.shared_prompt(model, [1, 2]):
            torch.testing.assert_close(model(ids).last_hidden_state, want, rtol=1e-5, atol=1e-5)
    fastprefix.detach(model)
    error = "model: got Unmovable, whose forward takes no position_ids"
    peft = pytest.importorskip("peft")
    config = peft.PrefixTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=P)
    with pytest.raises(ValueError, match=error):
        fastprefix.patch(peft.get_peft_model(model, config))
    assert find_installation(model) is None
    fastprefix.attach(model, PrefixConfig(P, init=fastprefix.init.token_ids([3, 4])))
    ids, hidden = torch.randint(3, 99, (2, 7)), {}
    for name in ("default", None):
        fastprefix.set_prefix(model, name)
        hidden[name] = model(ids).last_hidden_state
    assert not torch.allclose(hidden["default"], hidden[None], atol=1e-3)


def test_two_towers_are_refused() -> None:
    """Which of them the prefix is for, only the caller knows."""
    sizes = ROWS["clip_vision"].options
    text = {**sizes, "vocab_size": 99}
    model = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=sizes))
    with pytest.raises(ValueError, match=r"model: got CLIPModel, which does not run on input_ids alone .*the part of"):
        fastprefix.attach(model, PrefixConfig(P))
    fastprefix.attach(model.vision_model, PrefixConfig(P))


def test_unknown_inputs_are_refused_by_name() -> None:
    config = transformers.PatchTSTConfig(d_model=32, num_hidden_layers=2, num_attention_heads=4, context_length=16)
    with pytest.raises(ValueError, match="model: got PatchTSTModel, which reads past_values, expected a model of inp"):
        fastprefix.attach(transformers.PatchTSTModel(config), PrefixConfig(P))
