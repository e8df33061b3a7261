"""Files of soft prompts that are trained through an encoder: PEFT's P_TUNING both ways, and training that resumes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import fastprefix
from fastprefix import PromptConfig
from tests.model_zoo.architectures import ROWS
from tests.support.soft_prompts import tokens

P = 5
KINDS: dict[str, dict[str, Any]] = {
    "mlp": {"encoder": "mlp", "encoder_hidden_size": 11},
    "lstm": {"encoder": "lstm", "encoder_hidden_size": 6, "encoder_num_layers": 3, "encoder_dropout": 0.2},
    "default": {"encoder": "lstm"},
}
parametrize = pytest.mark.parametrize("kind", KINDS)


def attached(kind: str) -> tuple[Any, Any]:
    model = ROWS["llama_gqa"].build()
    torch.manual_seed(3)
    return model, fastprefix.attach(model, PromptConfig(P, **KINDS[kind]))


def read(folder: Path, name: str = "adapter_config.json") -> dict[str, Any]:
    return json.loads((folder / name).read_text())


@parametrize
def test_peft_loads_ours(kind: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model, prompt = attached(kind)
    model.eval()
    want = model(input_ids=tokens()).logits
    model.train()  # dropout, which is not in the file
    fastprefix.save(model, tmp_path)
    assert read(tmp_path)["peft_type"] == "P_TUNING"
    config = peft.PeftConfig.from_pretrained(tmp_path)
    given = prompt.config
    assert config.encoder_reparameterization_type == given.encoder.upper()
    assert (
        config.encoder_hidden_size
        == (given.encoder_hidden_size or 32)
        == prompt.encoder.mlp_head[0].weight.shape[0] // (2 if given.encoder == "lstm" else 1)
    )
    assert (config.encoder_num_layers, config.encoder_dropout) == (given.encoder_num_layers, given.encoder_dropout)
    assert torch.equal(load_file(tmp_path / "adapter_model.safetensors")["prompt_embeddings"], prompt.without_dropout())
    theirs = peft.PeftModel.from_pretrained(ROWS["llama_gqa"].build(), tmp_path).eval()
    torch.testing.assert_close(theirs(input_ids=tokens()).logits[:, P:], want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["MLP", "LSTM"])
def test_we_load_pefts(kind: str, tmp_path: Path) -> None:
    """PEFT's files hold the encoder's output alone, which is loaded as embeddings."""
    peft = pytest.importorskip("peft")
    options = {"encoder_reparameterization_type": kind, "encoder_hidden_size": 8}
    config = peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=P, **options)
    theirs = peft.get_peft_model(ROWS["llama_gqa"].build(), config).eval()
    want = theirs(input_ids=tokens()).logits[:, P:]
    theirs.save_pretrained(tmp_path)
    model = ROWS["llama_gqa"].build()
    prompt = fastprefix.load(model, tmp_path)
    assert prompt.encoder is None and prompt.config.encoder is None
    torch.testing.assert_close(prompt(), theirs.get_prompt(1)[0], rtol=0, atol=0)
    torch.testing.assert_close(model(input_ids=tokens()).logits, want, rtol=1e-4, atol=1e-4)


@parametrize
def test_round_trip(kind: str, tmp_path: Path) -> None:
    model, prompt = attached(kind)
    fastprefix.save(model, tmp_path)
    twin = ROWS["llama_gqa"].build()
    again = fastprefix.load(twin, tmp_path, "again")
    given = KINDS[kind]
    assert {name: getattr(again.config, name) for name in given} == given
    assert again.state_dict().keys() == prompt.state_dict().keys()
    for a, b in zip(again.parameters(), prompt.parameters(), strict=True):
        assert torch.equal(a, b) and a.requires_grad
    assert torch.equal(twin(input_ids=tokens()).logits, model(input_ids=tokens()).logits)


def test_a_baked_one_is_saved_as_a_plain_prompt(tmp_path: Path) -> None:
    model, prompt = attached("mlp")
    fastprefix.save(model, tmp_path)
    assert (tmp_path / "prefix_encoder.safetensors").exists()
    fastprefix.bake(model)
    fastprefix.save(model, tmp_path)
    assert not (tmp_path / "prefix_encoder.safetensors").exists()
    assert read(tmp_path)["peft_type"] == "PROMPT_TUNING"
    again = fastprefix.load(ROWS["llama_gqa"].build(), tmp_path)
    assert again.encoder is None and torch.equal(again(), prompt())


def test_a_plain_prompts_file_has_no_new_fields(tmp_path: Path) -> None:
    """Older versions refuse fields that they do not know."""
    model = ROWS["llama_gqa"].build()
    fastprefix.attach(model, PromptConfig(P))
    fastprefix.save(model, tmp_path)
    names = {"format_version", "num_virtual_tokens", "init", "modules_to_save", "weights", "kind"}
    assert set(read(tmp_path, "fastprefix_config.json")) == names


@pytest.mark.parametrize("kind", ["mlp", "lstm"])
def test_training_resumes_exactly(kind: str, tmp_path: Path) -> None:
    ids = tokens()

    def steps(model: Any, optimizer: torch.optim.Optimizer) -> None:
        for seed in range(3):
            torch.manual_seed(seed)  # dropout's draws
            optimizer.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()

    found = []
    for resumed in (False, True):
        model, prompt = attached(kind)
        model.train()
        optimizer = torch.optim.AdamW(prompt.parameters(), lr=0.01)
        steps(model, optimizer)
        if resumed:
            fastprefix.save(model, tmp_path)
            model = ROWS["llama_gqa"].build().train()
            state = optimizer.state_dict()
            prompt = fastprefix.load(model, tmp_path)
            optimizer = torch.optim.AdamW(prompt.parameters(), lr=0.01)
            optimizer.load_state_dict(state)
        steps(model, optimizer)
        found.append(prompt)
    for a, b in zip(*(prompt.parameters() for prompt in found), strict=True):
        assert torch.equal(a, b)


def test_a_registered_one_has_no_dropout(tmp_path: Path) -> None:
    model, _ = attached("lstm")
    fastprefix.save(model, tmp_path)
    twin = ROWS["llama_gqa"].build().train()
    fastprefix.register(twin, {"stored": tmp_path})
    with fastprefix.prefix_batch(twin, ["stored"] * 3), torch.no_grad():
        got = twin(input_ids=tokens()).logits
    fastprefix.bake(model)
    torch.testing.assert_close(got, model(input_ids=tokens()).logits)
