"""``fastprefix.explain`` of a model: equal layers together, others apart, and why a model cannot carry a prefix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import transformers

import fastprefix
from fastprefix import PrefixConfig, cli
from tests.support.tiny_models import save_tiny, tiny_model

SIZES = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 32, "intermediate_size": 48}


def layer_lines(model: Any) -> list[str]:
    return [line for line in fastprefix.explain(model).splitlines() if line.startswith("layer")]


def test_equal_layers_are_told_together() -> None:
    config = transformers.LlamaConfig(**{**SIZES, "num_hidden_layers": 7})
    model = transformers.LlamaForCausalLM(config)
    fastprefix.attach(model, PrefixConfig(5, layers=[0, 1, 2, 4, 6]))
    text = fastprefix.explain(model)
    assert layer_lines(model) == [
        "layers 0-2, 4, 6, model.layers.0.self_attn to model.layers.6.self_attn: H=4 H_kv=4 D=8 P=5",
        "layers 3, 5, model.layers.3.self_attn to model.layers.5.self_attn: H=4 H_kv=4 D=8 P=0",
    ]
    assert text.count("chosen by auto") == 2


def test_layers_with_a_window_stay_apart() -> None:
    config = transformers.Gemma2Config(
        **{**SIZES, "num_hidden_layers": 5}, num_key_value_heads=2, head_dim=8, sliding_window=16
    )
    model = transformers.Gemma2ForCausalLM(config)
    fastprefix.attach(model, PrefixConfig(3))
    local, full = layer_lines(model)
    assert local.startswith("layers 0, 2, 4, ") and local.endswith(" window=16 P=3")
    assert full.startswith("layers 1, 3, ") and full.endswith(" D=8 P=3")


def test_a_model_that_cannot_carry_a_prefix_says_why_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mpt = transformers.MptForCausalLM(transformers.MptConfig(d_model=32, n_heads=4, n_layers=1, vocab_size=32))
    mamba = transformers.MambaForCausalLM(transformers.MambaConfig(hidden_size=32, num_hidden_layers=1, vocab_size=32))
    for model, message in (
        (mpt, "got MptForCausalLM, whose attention does not go through transformers' attention interface"),
        (mamba, "got MambaForCausalLM, which has no attention layers"),
    ):
        with pytest.raises(ValueError, match=message):
            fastprefix.explain(model)
        model.save_pretrained(tmp_path)
        capsys.readouterr()
        assert cli.main(["explain", "--model", str(tmp_path)]) == cli.USER_ERROR
        assert message in capsys.readouterr().err


def test_a_look_leaves_a_bare_model_as_it_was() -> None:
    model = tiny_model()
    ids = torch.arange(4, 10)[None]
    before = model(ids).logits
    with pytest.raises(ValueError, match="got LlamaForCausalLM without a prefix, expected a model that"):
        fastprefix.explain(model)
    assert torch.equal(model(ids).logits, before) and all(p.requires_grad for p in model.parameters())


def test_other_kinds_of_models_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = transformers.T5Config(d_model=32, num_heads=4, d_kv=8, d_ff=32, num_layers=2, vocab_size=32)
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    assert cli.main(["explain", "--model", str(tmp_path), "--num-virtual-tokens", "5"]) == 0
    assert "layers 3, 5, decoder.block.0.layer.1.EncDecAttention to " in capsys.readouterr().out


def test_an_adapter_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["explain", "--model", str(save_tiny(tmp_path / "model")), "--adapter", str(tmp_path / "nowhere")]
    capsys.readouterr()
    assert cli.main(words) == cli.USER_ERROR
    assert capsys.readouterr().err == f"fastprefix explain: --adapter: no folder {tmp_path}/nowhere\n"
