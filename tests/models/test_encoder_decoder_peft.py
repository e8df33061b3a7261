"""PEFT's adapters of encoder-decoders, and of layers that share keys, loaded as what PEFT computes of them."""

from __future__ import annotations

import json
import warnings
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import fastprefix
from fastprefix import PrefixConfig
from fastprefix.hf.storage.peft_format import CONFIG, OWN
from fastprefix.prefixes.prefix import Prefix
from tests.model_zoo.architectures import ROWS as DECODERS
from tests.model_zoo.encoder_decoders import LOADED, ROWS, batch
from tests.model_zoo.inputs import inputs
from tests.model_zoo.row import Row

peft = pytest.importorskip("peft")
P = 5


def tuned(model: Any, task: str) -> Any:
    """PEFT's prefix tuning with random numbers."""
    config = peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=P)
    found = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        found.prompt_encoder.default.embedding.weight.normal_(std=0.6)
    return found


def even(name: str) -> Row:
    """As many decoder layers as encoder layers: PEFT counts the encoder's."""
    row = ROWS[name]
    return replace(row, options={**row.options, "decoder_layers": 2}) if "decoder_layers" in row.options else row


def without_bias(model: Any) -> Any:
    """T5 whose decoder adds nothing for a distance."""
    with torch.no_grad():
        model.decoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.zero_()
    return model


@pytest.mark.parametrize("name", LOADED)
def test_an_adapter_of_an_encoder_decoder(name: str, tmp_path: Path) -> None:
    """What PEFT's decoder reads of it: half of the slots, each in two layers."""
    biased = name in ("t5", "mt5")
    make = (lambda: without_bias(even(name).build())) if biased else even(name).build
    theirs, data = tuned(make(), "SEQ_2_SEQ_LM"), batch(name)
    want = theirs(**data).logits
    theirs.save_pretrained(tmp_path)
    model = make()
    with says_of_biases() if biased else nullcontext():
        prefix = fastprefix.load(model, tmp_path)
    assert isinstance(prefix, Prefix) and set(prefix.parts) == {"decoder"}
    torch.testing.assert_close(model(**data).logits, want, rtol=1e-4, atol=1e-5)


def says_of_biases() -> AbstractContextManager[Any]:
    return pytest.warns(UserWarning, match="biases of relative positions")


def test_where_peft_adds_biases_to_the_prefix_outputs_differ_and_that_is_said(tmp_path: Path) -> None:
    theirs, data = tuned(ROWS["t5"].build(), "SEQ_2_SEQ_LM"), batch("t5")
    theirs.save_pretrained(tmp_path)
    model = ROWS["t5"].build()
    with says_of_biases():
        fastprefix.load(model, tmp_path)
    assert not torch.allclose(model(**data).logits, theirs(**data).logits, atol=1e-3)
    fastprefix.save(model, tmp_path / "ours")
    fastprefix.detach(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastprefix.load(model, tmp_path / "ours")


def test_an_adapter_whose_last_layers_share_keys(tmp_path: Path) -> None:
    """PEFT's slots of those layers are read by nobody: they read their source's, prefix included."""
    # No window, which would hide PEFT's prefix.
    row = replace(DECODERS["gemma3n"], options={**DECODERS["gemma3n"].options, "sliding_window": 32})
    theirs, data = tuned(row.build(), "CAUSAL_LM"), inputs("gemma3n", dtype=torch.float32)
    want = theirs(**data).logits
    theirs.save_pretrained(tmp_path)
    model = row.build()
    prefix = fastprefix.load(model, tmp_path)
    assert prefix.sources == (0, 1, 0, 1)
    torch.testing.assert_close(model(**data).logits, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["gemma3n", "albert", "falcon_h1"])
def test_what_peft_would_compute_otherwise_it_refuses(name: str, tmp_path: Path) -> None:
    """Layers that share keys have prefixes of their own, one module that is several has one, states have none."""
    model, data = DECODERS[name].build(), inputs(name, dtype=torch.float32)
    fastprefix.attach(model, PrefixConfig(P, init=fastprefix.init.normal(0.6)))
    want = model(**data)[0]
    fastprefix.save(model, tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["peft_type"] == OWN
    fastprefix.detach(model)
    fastprefix.load(model, tmp_path)
    assert torch.equal(model(**data)[0], want)
