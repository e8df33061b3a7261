"""Encoder-decoders in use: rows of their own, MLPs, files, texts, layers, parts of a model, and wrong calls."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import fastprefix
from fastprefix import PrefixConfig
from fastprefix.hf.adapters.lookup import require_installation
from fastprefix.hf.attention import position_embeddings
from fastprefix.prefixes.prefix import Prefix
from tests.model_zoo.architectures import ROWS as DECODERS
from tests.model_zoo.encoder_decoders import ROWS, P, S, attached, batch, cast, count_hooks, source
from tests.model_zoo.inputs import gradients
from tests.model_zoo.row import VOCAB


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("name", ["bart", "t5", "whisper", "pegasus", "m2m_100"])
def test_a_prefix_for_each_row(name: str, beams: int) -> None:
    """Prefixes of two lengths and none, side by side: each row as if it were alone."""
    model, _ = attached(name, torch.float32)
    other = PrefixConfig(3, init=fastprefix.init.normal(0.6), prefix_projection=True, parts=("decoder", "encoder"))
    fastprefix.attach(model, other, "other")
    inputs = source(batch(name, padded=True))
    options: dict[str, Any] = {"max_new_tokens": 6, "num_beams": beams, "do_sample": False, "eos_token_id": None}
    names = ["default", None, "other"]
    with fastprefix.prefix_batch(model, names):
        got = model.generate(**inputs, **options)
    for i, one in enumerate(names):
        fastprefix.set_prefix(model, one)
        alone = model.generate(**{k: x[i : i + 1] for k, x in inputs.items()}, **options)
        assert torch.equal(got[i : i + 1], alone)


@pytest.mark.parametrize("name", ROWS)
def test_one_mlp_a_part(name: str) -> None:
    """As in the paper: three MLPs, each with embeddings of its own; all of it trains; baked it is the same."""
    model, prefix = attached(name, prefix_projection=True, encoder_hidden_size=7)
    inputs = cast(batch(name), torch.float64)
    x = model(**inputs).logits
    assert {n.split(".")[1] for n, _ in prefix.named_parameters()} == {"encoder", "decoder", "cross"}
    for name_, grad in zip(dict(prefix.named_parameters()), gradients(x, list(prefix.parameters())), strict=True):
        assert grad.abs().max() > 0, name_
    fastprefix.bake(model)
    assert prefix.encoder is None
    torch.testing.assert_close(model(**inputs).logits, x)


@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("name", ["bart", "t5", "whisper"])
def test_saved_and_loaded(name: str, projected: bool, tmp_path: Any) -> None:
    model, _ = attached(name, torch.float32, prefix_projection=projected, parts=("encoder", "cross"))
    inputs = batch(name)
    want = model(**inputs).logits
    fastprefix.save(model, tmp_path)
    fastprefix.detach(model)
    prefix = fastprefix.load(model, tmp_path)
    assert isinstance(prefix, Prefix) and prefix.config.parts == ("encoder", "cross")
    assert (prefix.encoder is not None) == projected
    assert torch.equal(model(**inputs).logits, want)


@pytest.mark.parametrize("name", [name for name in ROWS if name != "whisper"])
def test_starts_from_a_text(name: str) -> None:
    """The model's own keys and values of it: as if the source and the target had begun with it."""
    ids = [5, 6, 7, 8, 9]
    model = ROWS[name].build(torch.float64)
    config = PrefixConfig(5, init=fastprefix.init.token_ids(ids), position_offset="none")
    prefix = fastprefix.attach(model, config)
    tokens = torch.tensor([ids])
    state = require_installation(model)
    caught: dict[int, Tensor] = {}
    handles = [
        m.k_proj.register_forward_hook(lambda _m, _a, out, i=i: caught.update({i: out}))
        if hasattr(m, "k_proj")
        else m.k.register_forward_hook(lambda _m, _a, out, i=i: caught.update({i: out}))
        for i, m in enumerate(state.facts.layers.modules)
    ]
    fastprefix.set_prefix(model, None)
    model(input_ids=tokens, decoder_input_ids=tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    for i, (k, _) in enumerate(prefix.key_values()):
        heads = caught[i].unflatten(-1, (k.shape[0], -1))[0].transpose(0, 1)
        torch.testing.assert_close(k.double(), heads, rtol=1e-6, atol=1e-6)


def test_a_text_starts_a_speech_models_decoder_alone() -> None:
    model = ROWS["whisper"].build()
    with pytest.raises(ValueError, match=r"init: got .*input_features, expected parts=\('decoder',\)"):
        fastprefix.attach(model, PrefixConfig(3, init=fastprefix.init.token_ids([4, 5, 6])))
    prefix = fastprefix.attach(model, PrefixConfig(3, init=fastprefix.init.token_ids([4, 5, 6]), parts=("decoder",)))
    assert prefix.parts == ("decoder",) * 3


def test_layers_are_counted_within_each_part() -> None:
    model, prefix = attached("t5", layers=[1])
    assert prefix.parts == ("encoder", "decoder", "cross")
    fastprefix.detach(model)
    with pytest.raises(ValueError, match=r"layers: got 2, expected an index in 0\.\.1, the attention layers of 'enc"):
        fastprefix.attach(ROWS["bart"].build(), PrefixConfig(P, layers=[2]))
    assert len(fastprefix.attach(model, PrefixConfig(P, layers=[2], parts=("cross", "decoder"))).layers) == 2


def test_the_wrong_call_says_what_was_wrong() -> None:
    with pytest.raises(ValueError, match=r"parts: got \['encoder', 'both'\], expected distinct ones of"):
        PrefixConfig(P, parts=("encoder", "both"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"parts: got \['cross'\], expected None: the model is no encoder-decoder"):
        fastprefix.attach(DECODERS["llama_gqa"].build(), PrefixConfig(P, parts=("cross",)))
    model = ROWS["bart"].build()
    fastprefix.attach(model, PrefixConfig(62))
    with pytest.raises(ValueError, match="decoder_input_ids: got tokens behind a prefix that moves them by 62"):
        model(**batch("bart"))
    with pytest.raises(ValueError, match="encoder-decoder"), fastprefix.shared_prompt(model, torch.tensor([[1, 2]])):
        pass


def test_explain_names_the_parts() -> None:
    model, _ = attached("t5", torch.float32, parts=("cross",))
    text = fastprefix.explain(model)
    self_attention, cross = ("{}.block.{}.layer.0.SelfAttention", "decoder.block.{}.layer.1.EncDecAttention")
    first, last = (self_attention.format("encoder", i) for i in (0, 2))
    assert "3 of 9 layers" in text and f"layers 0-2, {first} to {last}: H=4 H_kv=4 D=8 P=0" in text
    assert f"layers 4, 6, 8, {cross.format(0)} to {cross.format(2)}: H=4 H_kv=4 D=8 P=5" in text


def test_trains() -> None:
    """Steps on all three parts lower the loss, and the frozen model's weights stay."""
    model, prefix = attached("bart", torch.float32)
    inputs, labels = source(batch("bart")), torch.randint(3, VOCAB, (3, S))
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW(prefix.parameters(), lr=0.05)
    losses = []
    for _ in range(30):
        loss = model(**inputs, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)


@pytest.mark.parametrize("name", ["bart", "t5"])
def test_a_decoder_alone_runs_without_cross_attention(name: str) -> None:
    """Its first forward may be without an encoder's states; the check for skipped layers waits for one with them."""
    model, _ = attached(name, torch.float32)
    decoder, ids, state = model.get_decoder(), batch(name)["decoder_input_ids"], require_installation(model)
    got = decoder(input_ids=ids)[0]
    fastprefix.set_prefix(model, None)
    assert not torch.allclose(decoder(input_ids=ids)[0], got, atol=1e-3)
    assert not state.hooks[-1].checked


@pytest.mark.parametrize("family", ["Bart", "Whisper"])
def test_a_decoder_with_a_head_of_its_own(family: str) -> None:
    """Its config counts the encoder's layers, which it does not have."""
    options = {**ROWS[family.lower()].options, "is_decoder": True, "is_encoder_decoder": False}
    options.update(encoder_layers=3, decoder_layers=2)
    model = getattr(transformers, family + "ForCausalLM")(getattr(transformers, family + "Config")(**options)).eval()
    prefix = fastprefix.attach(model, PrefixConfig(P))
    assert len(prefix.layers) == 2


def test_a_decoder_whose_positions_cannot_be_moved_is_refused_and_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ROWS["bart"].build()
    before = [n for n, _ in model.named_modules()], count_hooks(model), dict(vars(model)), model.config
    monkeypatch.setattr(position_embeddings, "find_table", lambda owner: None)
    for _ in range(2):
        with pytest.raises(
            ValueError, match="model: got BartForConditionalGeneration, whose positions cannot be moved"
        ):
            fastprefix.attach(model, PrefixConfig(P))
    assert ([n for n, _ in model.named_modules()], count_hooks(model), dict(vars(model)), model.config) == before
