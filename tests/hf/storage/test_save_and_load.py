"""save and load: PEFT's format both ways, what PEFT has no field for, the MLP, and files that are not right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import fastprefix
from fastprefix import PrefixConfig, init
from fastprefix.hf.storage.peft_format import pack, unpack
from fastprefix.prefixes.config import LayerShape
from fastprefix.prefixes.prefix import Prefix
from tests.model_zoo.architectures import ROWS, VOCAB

P = 6


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(3, VOCAB, (2, 9))


def attached(name: str = "llama_gqa", **options: Any) -> Any:
    model = ROWS[name].build()
    fastprefix.attach(model, PrefixConfig(P, **{"init": init.normal(0.5), **options}))
    return model


def test_pack_puts_keys_and_values_in_slots_2i_and_2i_plus_1() -> None:
    keys, values = [torch.randn(2, P, 4) for _ in range(3)], [torch.randn(2, P, 4) for _ in range(3)]
    packed = pack(keys, values)
    assert packed.shape == (P, 2 * 3 * 2 * 4)
    slots = packed.view(P, 6, 2, 4)
    assert torch.equal(slots[:, 2, 1], keys[1][1]) and torch.equal(slots[:, 5, 0], values[2][0])
    back = unpack(packed, Prefix(PrefixConfig(P), [LayerShape(2, 4, 4)] * 3, range(3)))
    assert all(
        torch.equal(a, b)
        for got, want in zip(back, (keys, values), strict=True)
        for a, b in zip(got, want, strict=True)
    )


@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("name", ["llama_gqa", "qwen3", "gpt2", "bert"])
def test_peft_loads_ours(name: str, projected: bool, tmp_path: Path, ids: torch.Tensor) -> None:
    from peft import PeftModel

    model = attached(name, prefix_projection=projected)
    out = model(input_ids=ids)
    fastprefix.save(model, tmp_path)
    fastprefix.detach(model)
    peft = PeftModel.from_pretrained(model, str(tmp_path)).eval()
    torch.testing.assert_close(peft(input_ids=ids)[0], out[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["prefix", "projected", "cartridge"])
def test_we_load_pefts(kind: str, tmp_path: Path, ids: torch.Tensor) -> None:
    import peft

    model = ROWS["llama_gqa"].build()
    common = {"task_type": "CAUSAL_LM", "num_virtual_tokens": P}
    match kind:
        case "prefix":
            config: Any = peft.PrefixTuningConfig(**common)
        case "projected":
            config = peft.PrefixTuningConfig(**common, prefix_projection=True, encoder_hidden_size=16)
        case _:
            config = peft.CartridgeConfig(**common, num_frozen_tokens=2)
    theirs = peft.get_peft_model(model, config).eval()
    want = theirs(input_ids=ids).logits
    theirs.save_pretrained(tmp_path)
    fresh = ROWS["llama_gqa"].build()
    prefix = fastprefix.load(fresh, tmp_path)
    torch.testing.assert_close(fresh(input_ids=ids).logits, want, rtol=1e-4, atol=1e-4)
    assert prefix.config.num_frozen_tokens == (2 if kind == "cartridge" else 0)
    fastprefix.save(fresh, tmp_path / "again")
    assert json.loads((tmp_path / "again/adapter_config.json").read_text())["peft_type"] == config.peft_type.value


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"layers": [1]},
        {"position_offset": "none"},
        {"num_frozen_tokens": 3},
        {"prefix_projection": True, "encoder_hidden_size": 7},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["llama_gqa", "deepseek_v3"])
def test_round_trip(name: str, options: dict[str, Any], tmp_path: Path, ids: torch.Tensor) -> None:
    model = attached(name, **options)
    fastprefix.save(model, tmp_path)
    twin = ROWS[name].build()
    prefix = fastprefix.load(twin, tmp_path, "again")
    assert torch.equal(twin(input_ids=ids).logits, model(input_ids=ids).logits)
    mine = model._fastprefix.selection.prefixes["default"]
    assert [(n, tuple(p.shape)) for n, p in prefix.named_parameters()] == [
        (n, tuple(p.shape)) for n, p in mine.named_parameters()
    ]
    for a, b in zip(prefix.parameters(), mine.parameters(), strict=True):
        assert torch.equal(a, b) and a.requires_grad
    assert (prefix.encoder is not None) == ("prefix_projection" in options)


@pytest.mark.parametrize("options", [{"layers": [1]}, {"position_offset": "none"}])
def test_what_peft_would_get_wrong_it_refuses(options: dict[str, Any], tmp_path: Path) -> None:
    from peft import PeftModel

    fastprefix.save(attached(**options), tmp_path)
    with pytest.raises((KeyError, ValueError), match="FASTPREFIX"):
        PeftModel.from_pretrained(ROWS["llama_gqa"].build(), str(tmp_path))


def test_training_resumes_exactly_through_the_mlp(tmp_path: Path, ids: torch.Tensor) -> None:
    def steps(model: Any, optimizer: torch.optim.Optimizer, n: int) -> None:
        for _ in range(n):
            optimizer.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()

    models, optimizers = [], []
    for resumed in (False, True):
        torch.manual_seed(0)
        model = attached(prefix_projection=True)
        optimizer = torch.optim.AdamW(model._fastprefix.selection.prefixes["default"].parameters(), lr=0.01)
        steps(model, optimizer, 3)
        if resumed:
            fastprefix.save(model, tmp_path)
            model = ROWS["llama_gqa"].build()
            state = optimizer.state_dict()
            optimizer = torch.optim.AdamW(fastprefix.load(model, tmp_path).parameters(), lr=0.01)
            optimizer.load_state_dict(state)
        steps(model, optimizer, 3)
        models.append(model)
        optimizers.append(optimizer)
    for a, b in zip(*(m._fastprefix.selection.prefixes["default"].parameters() for m in models), strict=True):
        assert torch.equal(a, b)


def test_saving_again_leaves_nothing_of_before(tmp_path: Path) -> None:
    model = attached(prefix_projection=True)
    fastprefix.save(model, tmp_path)
    assert (tmp_path / "prefix_encoder.safetensors").exists()
    fastprefix.bake(model)
    fastprefix.save(model, tmp_path)
    names = {"adapter_config.json", "adapter_model.safetensors", "fastprefix_config.json", "README.md"}
    assert {p.name for p in tmp_path.iterdir()} == names


def test_an_interrupted_save_keeps_the_old_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = attached()
    fastprefix.save(model, tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def broken(tensors: Any, path: str) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("fastprefix.hf.storage.validated_files.save_file", broken)
    with pytest.raises(OSError, match="disk full"):
        fastprefix.save(model, tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def _edit(path: Path, **changes: Any) -> None:
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, **changes}))


def test_what_is_not_right_is_refused_by_path_and_field(tmp_path: Path) -> None:
    fresh = ROWS["llama_gqa"].build()
    with pytest.raises(ValueError, match=r"dir: got no file .*adapter_config.json"):
        fastprefix.load(fresh, tmp_path)

    def refused(message: str, model: Any = fresh) -> None:
        with pytest.raises(ValueError, match=message):
            fastprefix.load(model, tmp_path)
        assert not hasattr(model, "_fastprefix")
        fastprefix.save(attached(), tmp_path)

    fastprefix.save(attached(), tmp_path)
    refused(r"prompt_embeddings: got shape \[6, 64\], expected .* = \[6, 128\]", ROWS["llama_mha"].build())
    (tmp_path / "adapter_config.json").write_text("{")
    refused(r"adapter_config.json: got no JSON")
    (tmp_path / "adapter_config.json").write_text("[]")
    refused(r"adapter_config.json: got list")
    _edit(tmp_path / "adapter_config.json", peft_type=None)
    refused(r"adapter_config.json: peft_type: got None")
    (tmp_path / "fastprefix_config.json").unlink()
    _edit(tmp_path / "adapter_config.json", peft_type="LORA")
    refused(r"peft_type: got 'LORA', expected PREFIX_TUNING")
    _edit(tmp_path / "fastprefix_config.json", format_version=9)
    refused(r"format_version: got 9, expected 1")
    _edit(tmp_path / "fastprefix_config.json", num_virtual_tokens=-1)
    refused(r"fastprefix_config.json: num_virtual_tokens: got -1")
    _edit(tmp_path / "fastprefix_config.json", num_virtual_tokens=7)
    refused(r"prompt_embeddings: got shape \[6, 64\], expected .* = \[7, 64\]")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"\x00" * 20)
    refused(r"adapter_model.safetensors: got no safetensors")
    (tmp_path / "adapter_model.safetensors").unlink()
    (tmp_path / "adapter_model.bin").write_bytes(b"pickle")
    refused(r"no file .*adapter_model.safetensors: pickles are not loaded")
    save_file({"something": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    refused(r"adapter_model.safetensors: layers.0.k: got no such tensor")
    fastprefix.save(attached(prefix_projection=True), tmp_path)
    tensors = load_file(tmp_path / "prefix_encoder.safetensors")
    save_file({**tensors, "down.weight": torch.zeros(3, 3)}, tmp_path / "prefix_encoder.safetensors")
    refused(r"prefix_encoder.safetensors: down.weight: got shape \[3, 3\]")


def test_no_such_prefix(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"name: got 'other', expected one of \['default'\]"):
        fastprefix.save(attached(), tmp_path, "other")
