"""Encoder-decoders: three prefixes, equal to explicit concatenation in every forward and every way to generate."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import fastprefix
from fastprefix import PrefixConfig
from fastprefix.hf import tables
from fastprefix.hf.state import installation
from fastprefix.prefixes.prefix import Prefix
from tests.concat import concatenating, run_concat
from tests.encoder_decoders import ALL, KIN, ROWS, S, batch, cast, key_values, move_positions
from tests.model_inputs import without_dropout
from tests.models import VOCAB

P = 5
CHOICES = [("encoder", "decoder", "cross"), ("encoder",), ("decoder",), ("cross",)]


def attached(name: str, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[Any, Prefix]:
    """A model with a random prefix in the model's dtype."""
    model = ALL[name].build(dtype)
    decoder = model.get_decoder()
    if name == "umt5" and not getattr(decoder.block[0].layer[0].SelfAttention, "is_causal", True):
        pytest.skip("this transformers' own UMT5 sees the future under SDPA")
    prefix = fastprefix.attach(model, PrefixConfig(P, init=fastprefix.init.normal(0.6), **options))
    return model, prefix.to(dtype)


def logits(result: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Those of the targets' real tokens."""
    mask = inputs.get("decoder_attention_mask")
    return result.logits if mask is None else result.logits[mask.bool()]


def gradients(x: Tensor, leaves: list[Tensor]) -> tuple[Tensor, ...]:
    weight = torch.sin(torch.arange(x.numel(), dtype=x.dtype)).view(x.shape)
    return torch.autograd.grad((x * weight).sum(), leaves)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("parts", CHOICES)
@pytest.mark.parametrize("name", ROWS)
def test_equals_explicit_concatenation(name: str, parts: tuple[str, ...], padded: bool) -> None:
    """Each part alone and all of them; every number of every layer's keys and values gets its gradient."""
    model, prefix = attached(name, parts=parts)
    inputs = cast(batch(name, padded), torch.float64)
    got = logits(model(**inputs), inputs)
    grads = gradients(got, list(prefix.parameters()))
    pairs = key_values(model, prefix, leaves=True)
    assert {part for part in prefix.parts} == set(parts)
    assert len(pairs) == sum({"encoder": 3 if "t5" in name else 2}.get(part, 3) for part in parts)
    # Whisper takes position ids: there left padding counts for nothing, as in its generate.
    check(model, pairs, inputs, got, grads, **(counted(inputs) if name == "whisper" and padded else {}))


def counted(inputs: dict[str, Tensor], first: int = 0) -> dict[str, Tensor]:
    """The targets' position ids, real tokens alone counted."""
    mask = inputs.get("decoder_attention_mask", torch.ones(3, S, dtype=torch.long))
    return {"decoder_position_ids": (mask.cumsum(1) - 1).clamp(min=0) + first}


def check(
    model: Any, pairs: Any, inputs: dict[str, Tensor], got: Tensor, grads: tuple[Tensor, ...], **extra: Any
) -> None:
    """Logits and gradients are those of explicit concatenation."""
    fastprefix.detach(model)
    move_positions(model, P)
    want = logits(run_concat(model, pairs, **inputs, **extra), inputs)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    for grad, expected in zip(grads, gradients(want, [x for kv in pairs.values() for x in kv]), strict=True):
        assert (expected.abs().sum(-1) > 0).all(), "a head's prefix token without a gradient"
        torch.testing.assert_close(grad, expected, rtol=1e-6, atol=1e-6 * max(1.0, expected.abs().max().item()))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", KIN)
def test_their_kin_equal_explicit_concatenation(name: str, padded: bool) -> None:
    model, prefix = attached(name)
    inputs = batch(name, padded)
    got = logits(model(**inputs), inputs)
    grads = gradients(got, list(prefix.parameters()))
    extra = counted(inputs, first=P) if name == "t5gemma" else {}
    check(model, key_values(model, prefix, leaves=True), inputs, got, grads, **extra)


def source(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """What ``generate`` is given."""
    return {k: x for k, x in inputs.items() if not k.startswith("decoder")}


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", ALL)
def test_generate_equals_explicit_concatenation(name: str, beams: int) -> None:
    """Greedily and with beams, through caches of self- and cross-attention."""
    # T5Gemma's rotary positions cannot be moved from outside of generate.
    options = {"position_offset": "none"} if name == "t5gemma" else {}
    model, prefix = attached(name, torch.float32, **options)
    inputs = source(batch(name, padded=True))
    got = generated(model, inputs, beams)
    fastprefix.set_prefix(model, None)
    assert (generated(model, inputs, beams)[1] - got[1]).abs().max() > 0.1
    fastprefix.set_prefix(model, "default")
    pairs = {n: (k.detach(), v.detach()) for n, (k, v) in key_values(model, prefix).items()}
    fastprefix.detach(model)
    move_positions(model, P)
    with concatenating(model, pairs) as twin:
        want = generated(twin, inputs, beams)
    assert torch.equal(got[0], want[0])
    torch.testing.assert_close(got[1], want[1], rtol=1e-3, atol=1e-3)


def generated(model: Any, inputs: dict[str, Tensor], beams: int) -> tuple[Tensor, Tensor]:
    """Tokens, and the scores ``[steps, B * beams, V]`` that they were chosen by."""
    out = model.generate(
        **inputs, max_new_tokens=7, num_beams=beams, do_sample=False, eos_token_id=None,
        output_scores=True, return_dict_in_generate=True,
    )  # fmt: skip
    return out.sequences, torch.stack(out.scores)


@pytest.mark.parametrize("name", ROWS)
def test_positions_may_stay(name: str) -> None:
    """position_offset="none": the decoder's content starts at 0."""
    model, prefix = attached(name, position_offset="none")
    inputs = cast(batch(name), torch.float64)
    got = model(**inputs).logits
    pairs = key_values(model, prefix)
    fastprefix.detach(model)
    torch.testing.assert_close(got, run_concat(model, pairs, **inputs).logits, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize(("name", "projected"), [(name, name == "bart") for name in ALL])
def test_gradient_checkpointing(name: str, projected: bool, reentrant: bool) -> None:
    model, prefix = attached(name, prefix_projection=projected)
    inputs = {**cast(batch(name, padded=True), torch.float64), "use_cache": False}
    without_dropout(model)
    model.train()
    want = gradients(logits(model(**inputs), inputs), list(prefix.parameters()))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    x = logits(model(**inputs), inputs)
    (x * torch.sin(torch.arange(x.numel(), dtype=x.dtype)).view(x.shape)).sum().backward()
    for parameter, expected in zip(prefix.parameters(), want, strict=True):
        assert parameter.grad is not None and expected.abs().max() > 0
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ALL)
def test_compiled(name: str) -> None:
    torch._dynamo.reset()
    model, prefix = attached(name, torch.float32)
    inputs = batch(name)
    x = model(**inputs, use_cache=False).logits
    want = gradients(x, list(prefix.parameters()))
    compiled = torch.compile(model, backend="aot_eager")
    y = compiled(**inputs, use_cache=False).logits
    torch.testing.assert_close(y, x, rtol=1e-4, atol=1e-4)
    for got, expected in zip(gradients(y, list(prefix.parameters())), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3 * max(1.0, expected.abs().max().item()))


@pytest.mark.parametrize("name", ALL)
def test_detached_is_bit_for_bit_what_it_was(name: str) -> None:
    model, inputs = ALL[name].build(), batch(name, padded=True)
    model.requires_grad_(False)  # SDPA takes another way where a bias wants a gradient
    before, config = model(**inputs).logits, model.config
    modules, hooks = [n for n, _ in model.named_modules()], count_hooks(model)
    fastprefix.attach(model, PrefixConfig(P, prefix_projection=True))
    assert not torch.equal(model(**inputs).logits, before)
    fastprefix.set_prefix(model, None)
    assert torch.equal(model(**inputs).logits, before)
    fastprefix.detach(model)
    assert torch.equal(model(**inputs).logits, before) and model.config is config
    assert [n for n, _ in model.named_modules()] == modules and count_hooks(model) == hooks


def count_hooks(model: Any) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


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
    state = installation(model)
    caught: dict[int, Tensor] = {}
    handles = [
        m.k_proj.register_forward_hook(lambda _m, _a, out, i=i: caught.update({i: out}))
        if hasattr(m, "k_proj")
        else m.k.register_forward_hook(lambda _m, _a, out, i=i: caught.update({i: out}))
        for i, m in enumerate(state.layers.modules)
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
    from tests.models import ROWS as DECODERS

    with pytest.raises(ValueError, match=r"parts: got \['cross'\], expected None: the model is no encoder-decoder"):
        fastprefix.attach(DECODERS["llama_gqa"].build(), PrefixConfig(P, parts=("cross",)))
    model = ROWS["bart"].build()
    with pytest.raises(ValueError, match="encoder-decoder"):
        fastprefix.attach(model, fastprefix.PromptConfig(P))
    fastprefix.attach(model, PrefixConfig(62))
    with pytest.raises(ValueError, match="decoder_input_ids: got tokens behind a prefix that moves them by 62"):
        model(**batch("bart"))
    with pytest.raises(ValueError, match="encoder-decoder"), fastprefix.shared_prompt(model, torch.tensor([[1, 2]])):
        pass


def test_explain_names_the_parts() -> None:
    model, _ = attached("t5", torch.float32, parts=("cross",))
    text = fastprefix.explain(model)
    assert "3 of 9 layers" in text and "EncDecAttention: H=4 H_kv=4 D=8 P=5" in text
    assert "encoder.block.0.layer.0.SelfAttention: H=4 H_kv=4 D=8 P=0" in text


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
    decoder, ids = model.get_decoder(), batch(name)["decoder_input_ids"]
    got = decoder(input_ids=ids)[0]
    fastprefix.set_prefix(model, None)
    assert not torch.allclose(decoder(input_ids=ids)[0], got, atol=1e-3)
    assert not installation(model).hooks[-1].checked


@pytest.mark.parametrize("family", ["Bart", "Whisper"])
def test_a_decoder_with_a_head_of_its_own(family: str) -> None:
    """Its config counts the encoder's layers, which it does not have."""
    options = {**ROWS[family.lower()].options, "is_decoder": True, "is_encoder_decoder": False}
    options.update(encoder_layers=3, decoder_layers=2)
    model = getattr(transformers, family + "ForCausalLM")(getattr(transformers, family + "Config")(**options)).eval()
    prefix = fastprefix.attach(model, PrefixConfig(P))
    assert len(prefix.layers) == 2


@pytest.mark.parametrize("name", [name for name in ALL if name != "t5gemma"])
def test_a_static_cache(name: str) -> None:
    model, _ = attached(name, torch.float32)
    inputs = source(batch(name))
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    want = model.generate(**inputs, **options)
    assert torch.equal(model.generate(**inputs, **options, cache_implementation="static"), want)


def test_masks_made_in_advance_need_their_positions() -> None:
    """T5Gemma's static caches: which tokens are padding is no longer to be seen."""
    model, _ = attached("t5gemma", torch.float32)
    with pytest.raises(ValueError, match="position_ids: got None beside masks made in advance"):
        model.generate(**source(batch("t5gemma")), max_new_tokens=3, cache_implementation="static")


def test_a_decoder_whose_positions_cannot_be_moved_is_refused_and_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ROWS["bart"].build()
    before = [n for n, _ in model.named_modules()], count_hooks(model), dict(vars(model)), model.config
    monkeypatch.setattr(tables, "find", lambda owner: None)
    for _ in range(2):
        with pytest.raises(
            ValueError, match="model: got BartForConditionalGeneration, whose positions cannot be moved"
        ):
            fastprefix.attach(model, PrefixConfig(P))
    assert ([n for n, _ in model.named_modules()], count_hooks(model), dict(vars(model)), model.config) == before
