"""Mass, bias, slots and relative attention equal what whole attention matrices say, in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastprefix
from fastprefix import PrefixConfig, PromptConfig, analysis
from fastprefix.analysis import attention, slots
from fastprefix.hf.adapters.lookup import require_installation
from tests.analysis.dense import CASES, TOLERANCE, attached, bare, batch_of, dense, in_double, rows
from tests.model_zoo import encoder_decoders
from tests.model_zoo.architectures import ROWS
from tests.model_zoo.inputs import P, inputs
from tests.support.concat_oracle import Weights, run_concat, weights


def assert_close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want.to(got.dtype), **TOLERANCE)


@pytest.mark.parametrize(("name", "padding"), CASES)
def test_mass(name: str, padding: str) -> None:
    model, pairs = attached(name)
    batch, real = batch_of(name, padding)
    with in_double():
        found = analysis.prefix_mass(model, batch)
    want = dense(model, pairs, batch, name)
    assert len(found.mass) == len(want) == 2 and found.layers == tuple(pairs)
    for got, layer in zip(found.mass, want, strict=True):
        mass = layer.p[..., :P].sum(-1)  # [B, H, S]
        assert torch.equal(~got.isnan(), real[:, None].expand_as(got)) and mass.std() > 0.01
        assert_close(rows(got, real), rows(mass, real))
    assert_close(found.by_head()[1], rows(want[1].p[..., :P].sum(-1), real).mean(1))
    assert_close(found.by_token()[0][real], want[0].p[..., :P].sum(-1).mean(1)[real])


@pytest.mark.parametrize(("name", "padding"), CASES)
def test_bias(name: str, padding: str) -> None:
    model, pairs = attached(name)
    batch, real = batch_of(name, padding)
    with in_double():
        found = analysis.bias_decomposition(model, batch)
    for i, layer in enumerate(dense(model, pairs, batch, name)):
        whole, added = rows(layer.p @ layer.v, real), rows(layer.p[..., :P] @ layer.v[..., :P, :], real)
        assert found.error[i].max() < 1e-12
        assert_close(found.output[i], whole.norm(dim=2).square().mean(1).sqrt())
        assert_close(found.bias[i], added.norm(dim=2).square().mean(1).sqrt())
        _, values, right = torch.linalg.svd(added, full_matrices=False)
        assert_close(found.singular_values[i], values)
        assert_close((found.direction[i] * right[:, 0]).sum(1).abs(), torch.ones(len(right)))
        assert ((added.mean(1) * found.direction[i]).sum(1) >= 0).all()
        assert (found.rank(1e-9)[i] <= P).all() and (found.rank(1e-9)[i] == torch.linalg.matrix_rank(added)).all()
        assert_close(found.explained()[i], values[:, 0].square() / values.square().sum(1))


@pytest.mark.parametrize("chunk", [1, 2**22])
@pytest.mark.parametrize(("name", "padding"), CASES)
def test_slots(name: str, padding: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots, "_SCORES", chunk)
    model, pairs = attached(name)
    batch, real = batch_of(name, padding)
    with in_double():
        found = analysis.slot_mass(model, batch)
    for i, layer in enumerate(dense(model, pairs, batch, name)):
        each = rows(layer.p[..., :P], real)  # [H, n, P]
        assert_close(found.mean[i], each.mean(1))
        assert_close(found.peak[i], each.amax(1))
    assert found.dead() == ()


def test_a_slot_that_no_row_reads_is_dead() -> None:
    model, _ = attached("llama_gqa")
    prefix = model.get_submodule("model.layers.1.self_attn").fastprefix.prefixes["default"]
    batch = inputs("llama_gqa")
    with torch.no_grad():
        prefix.k[:, 3] = -20.0 * prefix.k[:, 3].sign()
    found = analysis.slot_mass(model, batch)
    want = dense(model, encoder_decoders.key_values(model, _prefix(model)), batch, "llama_gqa")
    peaks = [layer.p[..., :P].amax((0, 1, 2)) for layer in want]
    threshold = float(peaks[1][3]) * 1.001
    assert (1, 3) in found.dead(threshold) and (1, 3) not in found.dead(threshold / 1.01)


def _prefix(model: Any) -> Any:
    return require_installation(model).selection.prefixes["default"]


@pytest.mark.parametrize("chunk", [1, 2**22])
@pytest.mark.parametrize(("name", "padding"), CASES)
def test_relative_attention(name: str, padding: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_SCORES", chunk)
    model, pairs = attached(name)
    batch, real = batch_of(name, padding)
    with in_double():
        found = analysis.relative_attention(model, batch)
    with_prefix, without = dense(model, pairs, batch, name), dense(model, {}, batch, name)
    for i, (layer, plain) in enumerate(zip(with_prefix, without, strict=True)):
        distance = (_content(layer) - _content(plain)).abs().sum(-1) / 2
        assert_close(found.shift[i], rows(distance, real).mean(1))
        assert found.error[i].max() < 1e-12
    assert found.shift[1].min() > 1e-3  # the layer above reads what the prefix has changed


def _content(layer: Weights) -> Tensor:
    content = layer.p[..., layer.prefix :]
    return content / content.sum(-1, keepdim=True)


@pytest.mark.parametrize("name", ["t5", "bart", "t5gemma"])
def test_encoder_decoders(name: str) -> None:
    """Three parts, each with rows of its own."""
    model, prefix = encoder_decoders.attached(name)
    batch = encoder_decoders.batch(name, padded=True)
    pairs = encoder_decoders.key_values(model, prefix)
    with in_double():
        mass, bias = analysis.prefix_mass(model, batch), analysis.bias_decomposition(model, batch)
        own, moved = analysis.slot_mass(model, batch), analysis.relative_attention(model, batch)
    # Rotary positions of the decoder are counted after the prefix; the others' table is moved.
    places = (batch["decoder_attention_mask"].cumsum(1) - 1).clamp(min=0) + encoder_decoders.P
    extra = {"decoder_position_ids": places} if name == "t5gemma" else {}
    twin = bare(model)
    encoder_decoders.move_positions(twin, encoder_decoders.P)
    with weights() as want, in_double():
        run_concat(twin, pairs, **batch, **extra)
    assert set(mass.parts) == {"encoder", "decoder", "cross"} and len(mass.mass) == len(want)
    assert mass.parts == bias.parts == own.parts == moved.parts
    for i, (layer, part) in enumerate(zip(want, mass.parts, strict=True)):
        real = batch["attention_mask" if part == "encoder" else "decoder_attention_mask"].bool()
        each = rows(layer.p[..., : encoder_decoders.P], real)
        assert_close(rows(mass.mass[i], real), each.sum(-1))
        assert mass.mass[i].isnan().any() and moved.error[i].max() < 1e-12 > bias.error[i].max()
        assert_close(own.mean[i], each.mean(1))
    assert mass.by_token("encoder").shape[2] == encoder_decoders.T
    with pytest.raises(ValueError, match=r"part: got None, expected one of"):
        mass.by_token()


@pytest.mark.parametrize("layers", [None, [1]])
def test_a_bias_of_the_prefix_counts(layers: list[int] | None) -> None:
    model, pairs = attached("llama_gqa", prefix_bias=True, layers=layers)
    batch, real = batch_of("llama_gqa", "left")
    with in_double():
        mass, own = analysis.prefix_mass(model, batch), analysis.slot_mass(model, batch)
        moved = analysis.relative_attention(model, batch)
    want = [layer for layer in dense(model, pairs, batch, "llama_gqa") if layer.prefix]
    assert len(mass.mass) == len(own.mean) == len(moved.shift) == len(want) == (2 if layers is None else 1)
    for i, layer in enumerate(want):
        assert_close(rows(mass.mass[i], real), rows(layer.p[..., :P].sum(-1), real))
        assert_close(own.mean[i], rows(layer.p[..., :P], real).mean(1))
        assert moved.error[i].max() < 1e-12


@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_a_soft_prompt_is_a_prefix(padding: str) -> None:
    """It has the mass of the prefix of its own keys and values."""
    model = ROWS["llama_gqa"].build(torch.float64)
    batch, _ = batch_of("llama_gqa", padding)
    fastprefix.attach(model, PromptConfig(init=fastprefix.init.token_ids([9, 5, 20])))
    found = analysis.prefix_mass(model, batch)
    fastprefix.detach(model)
    prefix = fastprefix.attach(model, PrefixConfig(init=fastprefix.init.token_ids([9, 5, 20]))).double()
    same = analysis.prefix_mass(model, batch)
    for got, want in zip(found.mass, same.mass, strict=True):
        torch.testing.assert_close(got, want, rtol=0.0, atol=1e-6, equal_nan=True)  # the prefix was fp32
    assert prefix.num_virtual_tokens == 3


def test_each_row_of_a_block_has_the_mass_of_its_own_prefix() -> None:
    model, _ = attached("llama_gqa")
    fastprefix.attach(model, PrefixConfig(3, init=fastprefix.init.normal(0.6)), "other").double()
    batch = inputs("llama_gqa")
    alone = {name: analysis.prefix_mass(model, batch, name) for name in ("default", "other")}
    with fastprefix.prefix_batch(model, ["default", None, "other"]):
        mixed = analysis.prefix_mass(model, batch)
        with pytest.raises(ValueError, match="name: got prefixes of a row's own, expected one prefix for all rows"):
            analysis.slot_mass(model, batch)
    for i, m in enumerate(mixed.mass):
        assert_close(m[0], alone["default"].mass[i][0])
        assert_close(m[2], alone["other"].mass[i][2])
        assert torch.equal(m[1], torch.zeros_like(m[1]))


def test_no_attention_matrix_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inside the analyses nothing is as large as the scores of one layer."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        most = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.dim() >= 3:
                self.most = max(self.most, out.numel())
            return out

    monkeypatch.setattr(attention, "_SCORES", 2000)
    monkeypatch.setattr(slots, "_SCORES", 2000)
    monkeypatch.setenv("FASTPREFIX_BACKEND", "reference")
    shape = {"q": torch.randn(2, 4, 40, 8), "k": torch.randn(2, 2, 40, 8), "v": torch.randn(2, 2, 40, 8)}
    prefix = {"prefix_k": torch.randn(2, 5, 8), "prefix_v": torch.randn(2, 5, 8)}
    layer = analysis.forward.Layer("", None, {**shape, **prefix}, {}, torch.ones(2, 40).bool())
    lse = layer.whole(), layer.of_content(), layer.of_prefix()
    monkeypatch.setattr(analysis.forward.Layer, "whole", lambda self: lse[0])
    monkeypatch.setattr(analysis.forward.Layer, "of_content", lambda self: lse[1])
    monkeypatch.setattr(analysis.forward.Layer, "of_prefix", lambda self: lse[2])
    with Largest() as seen:
        layer.mass(), attention._error(layer), slots._of_layer(layer), attention._distance(layer, layer)
    assert 0 < seen.most <= 2 * 4 * 40 * 9 < 2 * 4 * 40 * 45
