"""A folder of adapters: what is read, what is refused by name, and what a change of files does."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

import fastprefix  # noqa: E402
from fastprefix import LlamaAdapterConfig, PrefixConfig, PromptConfig, init  # noqa: E402
from fastprefix.serving.vllm import adapters  # noqa: E402
from fastprefix.serving.vllm.adapters import AdapterFolder  # noqa: E402
from fastprefix.serving.vllm.geometry import Geometry, rotation  # noqa: E402
from fastprefix.serving.vllm.naming import UnknownPrefix, use_prefix  # noqa: E402
from fastprefix.serving.vllm.naming import named_in as named  # noqa: E402
from fastprefix.serving.vllm.spool import Resident, Spool  # noqa: E402
from tests.support.saved_adapters import OWN, WEIGHTS, edit_json, edit_tensors, saved  # noqa: E402
from tests.support.tiny_models import save_tiny, tiny_model  # noqa: E402

HEADS, DIM, LAYERS, HIDDEN = 2, 8, 2, 32  # of the tiny model


def geometry(model: str = "", **changed: Any) -> Geometry:
    sizes = {"layers": LAYERS, "num_kv_heads": HEADS, "head_dim": DIM, "hidden_size": HIDDEN, "dtype": torch.float32}
    return Geometry(model=model, **{**sizes, **changed})


def save(folder: Path, config: Any, seed: int = 0, peft_only: bool = False) -> Any:
    model = tiny_model()
    torch.manual_seed(seed)
    prefix = fastprefix.attach(model, config)
    fastprefix.save(model, folder)
    if peft_only:
        (folder / OWN).unlink()
    return prefix


@pytest.fixture
def folder(tmp_path: Path) -> AdapterFolder:
    (tmp_path / "adapters").mkdir()
    return AdapterFolder(tmp_path / "adapters", geometry(), Spool(tmp_path / "spool"))


def stored(entry: Any) -> dict[int, tuple[torch.Tensor, ...]]:
    return Resident(1).get(entry.path, dict.fromkeys(range(LAYERS)), slice(None))


@pytest.mark.parametrize("peft_only", [False, True])
@pytest.mark.parametrize(
    "config",
    [
        PrefixConfig(3, init=init.normal(0.5)),
        PrefixConfig(4, num_frozen_tokens=1, init=init.normal(0.5)),
        PrefixConfig(3, prefix_projection=True, encoder_hidden_size=5),
        PrefixConfig(3, layers=[0, 1], init=init.normal(0.5)),
    ],
    ids=["direct", "cartridge", "projected", "all layers by number"],
)
def test_keys_and_values_are_the_saved_ones(config: Any, peft_only: bool, folder: AdapterFolder) -> None:
    prefix = save(folder.folder / "a", config, peft_only=peft_only)
    entry = folder.get("a")
    assert (entry.name, entry.tokens) == ("a", config.num_virtual_tokens)
    for i, (k, v) in enumerate(prefix.key_values()):
        found = stored(entry)[i]
        torch.testing.assert_close(found[0], k.detach().transpose(0, 1), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(found[1], v.detach().transpose(0, 1), rtol=1e-6, atol=1e-6)


def test_content_names_a_prefix_and_not_its_folder(folder: AdapterFolder) -> None:
    for name, seed in (("a", 1), ("b", 2), ("c", 1)):
        save(folder.folder / name, PrefixConfig(3, init=init.normal(0.5)), seed)
    a, b, c = (folder.get(name) for name in "abc")
    assert a.digest == c.digest != b.digest and a.path == c.path
    assert folder.names() == ["a", "b", "c"]


def test_folders_come_change_and_go(folder: AdapterFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []
    original: Callable[..., Any] = adapters.read
    monkeypatch.setattr(adapters, "read", lambda path, *rest: reads.append(path.name) or original(path, *rest))
    with pytest.raises(UnknownPrefix, match="no adapter 'a'"):
        folder.get("a")
    assert not folder.has("a")
    save(folder.folder / "a", PrefixConfig(3, init=init.normal(0.5)), 1)
    first = folder.get("a")
    assert folder.has("a") and folder.get("a") is first and reads == ["a"]
    save(folder.folder / "a", PrefixConfig(3, init=init.normal(0.5)), 2)
    second = folder.get("a")
    assert second.digest != first.digest and reads == ["a", "a"]
    assert Path(first.path).is_file()  # for requests that are under way
    shutil.rmtree(folder.folder / "a")
    with pytest.raises(UnknownPrefix):
        folder.get("a")


def test_a_broken_adapter_is_told_once_read_and_works_once_mended(folder: AdapterFolder) -> None:
    save(folder.folder / "a", PrefixConfig(3, init=init.normal(0.5)))
    weights = (folder.folder / "a" / WEIGHTS).read_bytes()
    (folder.folder / "a" / WEIGHTS).write_bytes(weights[:-7])
    for _ in range(2):
        with pytest.raises(ValueError, match=r"prefix 'a': a/adapter_model.safetensors: got no safetensors"):
            folder.get("a")
    (folder.folder / "a" / WEIGHTS).write_bytes(weights)
    assert folder.get("a").tokens == 3


@pytest.mark.parametrize("name", ["", ".", "..", "../a", "a/b", "/etc", "a\0", "a\n", "é", "a" * 300, None, 3, ["a"]])
def test_names_stay_in_the_folder(name: Any, folder: AdapterFolder) -> None:
    save(folder.folder.parent / "outside", PrefixConfig(3, init=init.normal(0.5)))
    with pytest.raises(UnknownPrefix):
        folder.get(name)
    assert not folder.has(name)


REFUSED: dict[str, tuple[Any, str]] = {
    "gate": (PrefixConfig(3, gate="tanh"), "gate: got 'tanh', expected a prefix of keys and values"),
    "prefix_bias": (PrefixConfig(3, prefix_bias=True), "prefix_bias: got True, expected a prefix of keys"),
    "layers": (PrefixConfig(3, layers=[1]), "layers: got 1 of 2 layers, expected all of them"),
    "llama_adapter": (LlamaAdapterConfig(3, 2), "kind: got LlamaAdapter, expected a prefix of keys"),
    "place": (PromptConfig(3, place="after"), "place: got 'after', expected 'before'"),
    "offset": (
        PrefixConfig(3, position_offset="none"),
        "position_offset: got 'none', expected 'after_prefix': because",
    ),
    "modules": (PrefixConfig(3, modules_to_save=["lm_head"]), "modules_to_save: got lm_head, expected none"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", REFUSED)
def test_what_vllm_cannot_hold_is_refused_by_name(kind: str, folder: AdapterFolder) -> None:
    config, expected = REFUSED[kind]
    save(folder.folder / "a", config)
    folder.geometry = geometry(no_rotation="because")
    with pytest.raises(ValueError, match=expected):
        folder.get("a")


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "layers": ({"layers": 3}, r"prompt_embeddings: got shape \[3, 64\], expected .* = \[3, 96\] of this model"),
    "heads": ({"num_kv_heads": 4}, r"got shape \[3, 64\], expected .* = \[3, 128\]"),
    "as many numbers": ({"num_kv_heads": 4, "head_dim": 4}, "num_attention_heads: got 2, expected 4 of this model"),
}


@pytest.mark.parametrize("what", WRONG)
def test_another_model_is_refused(what: str, folder: AdapterFolder) -> None:
    saved(folder.folder / "a", "direct")
    folder.geometry = geometry(**WRONG[what][0])
    with pytest.raises(ValueError, match=WRONG[what][1]):
        folder.get("a")


def test_numbers_beyond_the_models_dtype_are_refused(folder: AdapterFolder) -> None:
    saved(folder.folder / "a", "direct")
    edit_tensors(folder.folder / "a" / WEIGHTS, lambda t: t["prompt_embeddings"].mul_(1e9))
    edit_json(folder.folder / "a" / OWN, weights=None)
    (folder.folder / "a" / OWN).unlink()
    folder.geometry = geometry(dtype=torch.float16)
    with pytest.raises(ValueError, match=r"numbers that are infinite in it, expected some in torch.float16"):
        folder.get("a")


@torch.no_grad()
def test_keys_of_position_offset_none_move_on_with_the_text(folder: AdapterFolder) -> None:
    """The moved keys in front of a text from P give the logits of the trained ones in front of a text from 0."""
    tokens = 5
    save(folder.folder / "a", PrefixConfig(tokens, position_offset="none", init=init.normal(0.7)))
    model, ids = tiny_model(), torch.arange(4, 14)[None]
    fastprefix.load(model, folder.folder / "a")
    want = model(input_ids=ids).logits
    folder.geometry = geometry(rotate=rotation(model.model.rotary_emb.inv_freq))
    cache = transformers.DynamicCache()
    for i, (k, v) in stored(folder.get("a")).items():
        cache.update(k.transpose(0, 1)[None], v.transpose(0, 1)[None], i)
    got = tiny_model()(input_ids=ids, past_key_values=cache).logits
    assert (got - want).abs().max() < 1e-5 < (want - tiny_model()(input_ids=ids).logits).abs().max()


@pytest.mark.slow
@torch.no_grad()
def test_a_soft_prompt_becomes_the_models_own_keys_and_values(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "model")
    (tmp_path / "adapters").mkdir()
    found = AdapterFolder(tmp_path / "adapters", geometry(str(base)), Spool(tmp_path / "spool"))
    torch.manual_seed(1)
    save(found.folder / "a", PromptConfig(4, encoder="mlp", encoder_hidden_size=6))
    model, ids = tiny_model(), torch.arange(4, 14)[None]
    fastprefix.load(model, found.folder / "a")
    want = model.eval()(input_ids=ids).logits
    cache = transformers.DynamicCache()
    for i, (k, v) in stored(found.get("a")).items():
        cache.update(k.transpose(0, 1)[None], v.transpose(0, 1)[None], i)
    got = tiny_model()(input_ids=ids, past_key_values=cache).logits
    assert (got - want[:, -10:]).abs().max() < 1e-5
    shutil.rmtree(base)
    os.utime(found.folder / "a" / WEIGHTS)
    with pytest.raises(ValueError, match="prompt: got a soft prompt, and the model does not run on it"):
        found.get("a")


def test_a_request_names_a_prefix_itself_or_by_the_block_around_it() -> None:
    assert named(None) is None and named({"prefix": "a"}) == "a" and named({"prefix": None}) is None
    with use_prefix("b"):
        assert named(None) == "b" and named({"prefix": "a"}) == "a"
        with use_prefix(None):
            assert named({}) is None
    assert named({}) is None
    with pytest.raises(ValueError, match="prefix: got 3, expected a text"):
        named({"prefix": 3})
