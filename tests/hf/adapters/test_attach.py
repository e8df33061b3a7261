"""attach, set_prefix, detach: options, several prefixes, two models of one config, copies, and every wrong call."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch

import fastprefix
from fastprefix import PrefixConfig, init
from tests.model_zoo.architectures import ROWS, VOCAB

P, S = 6, 9


@pytest.fixture
def model() -> Any:
    return ROWS["llama_gqa"].build()


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(3, VOCAB, (2, S))


def test_text_init_is_the_models_own_keys_and_values(model: Any, ids: torch.Tensor) -> None:
    """Attached at the KV of a text, the content behind it computes what it computes behind the text."""
    text = torch.randint(3, VOCAB, (P,))
    want = model(input_ids=torch.cat([text.expand(2, -1), ids], 1)).logits[:, P:]
    prefix = fastprefix.attach(model, PrefixConfig(P, init=init.token_ids(text)))
    torch.testing.assert_close(model(input_ids=ids).logits, want, rtol=1e-4, atol=1e-5)
    fastprefix.detach(model)
    cache = model(input_ids=text[None], use_cache=True).past_key_values
    given = fastprefix.attach(model, PrefixConfig(P, init=init.kv(cache)))
    for a, b in zip(prefix.parameters(), given.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    fastprefix.detach(model)
    one = fastprefix.attach(model, PrefixConfig(P, layers=[1], init=init.kv(cache)))
    torch.testing.assert_close(one.key_values()[0], given.key_values()[1])


@pytest.mark.parametrize("name", ["gpt2", "bert", "gemma3"])
def test_text_init_elsewhere(name: str, ids: torch.Tensor) -> None:
    model = ROWS[name].build()
    one = fastprefix.attach(model, PrefixConfig(3, init=init.token_ids([5, 6])))
    k, _ = one.key_values()[0]
    assert k.shape[1] == 3 and k.abs().max() > 0
    assert model(input_ids=ids) is not None


def test_text_init_through_the_mlp(model: Any, ids: torch.Tensor) -> None:
    text = torch.randint(3, VOCAB, (P,))
    fastprefix.attach(model, PrefixConfig(P, init=init.token_ids(text)))
    want = model(input_ids=ids).logits
    fastprefix.detach(model)
    prefix = fastprefix.attach(model, PrefixConfig(P, prefix_projection=True, init=init.token_ids(text)))
    assert prefix.encoder is not None
    torch.testing.assert_close(model(input_ids=ids).logits, want, rtol=1e-3, atol=1e-3)
    live = model(input_ids=ids).logits
    assert fastprefix.bake(model) is prefix
    assert prefix.encoder is None
    torch.testing.assert_close(model(input_ids=ids).logits, live, rtol=1e-5, atol=1e-5)
    assert not [n for n, _ in model.named_modules() if "encoder" in n]


def test_the_mlp_shared_and_layer_by_layer_are_the_same(model: Any) -> None:
    prefix = fastprefix.attach(model, PrefixConfig(P, prefix_projection=True, encoder_hidden_size=7))
    alone = prefix.key_values()
    assert prefix.encoder is not None
    prefix.encoder.share()
    for a, b in zip(alone, prefix.key_values(), strict=True):
        torch.testing.assert_close(a, b)
    prefix.encoder.unshare()


def test_a_subset_of_layers(model: Any, ids: torch.Tensor) -> None:
    bare = model(input_ids=ids, output_hidden_states=True).hidden_states
    prefix = fastprefix.attach(model, PrefixConfig(P, layers=[1], init=init.normal(0.5), position_offset="none"))
    assert len(list(prefix.parameters())) == 2
    hidden = model(input_ids=ids, output_hidden_states=True).hidden_states
    torch.testing.assert_close(hidden[1], bare[1], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(hidden[2], bare[2], atol=1e-3)


def test_frozen_leading_tokens_do_not_move(model: Any, ids: torch.Tensor) -> None:
    prefix = fastprefix.attach(model, PrefixConfig(P, num_frozen_tokens=2, init=init.token_ids([4, 5, 6, 7, 8, 9])))
    before = [(k.clone(), v.clone()) for k, v in prefix.key_values()]
    optimizer = torch.optim.AdamW(prefix.parameters(), lr=0.1, weight_decay=0.5)
    model(input_ids=ids).logits.square().mean().backward()
    optimizer.step()
    for (k, v), (k0, v0) in zip(prefix.key_values(), before, strict=True):
        for new, old in ((k, k0), (v, v0)):
            assert torch.equal(new[:, :2], old[:, :2]) and not torch.equal(new[:, 2:], old[:, 2:])
    assert {p.shape[1] for p in prefix.parameters()} == {P - 2}


def test_position_offset(ids: torch.Tensor) -> None:
    model = ROWS["gpt2"].build()
    seen: list[torch.Tensor] = []
    model.transformer.wpe.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    for offset in ("after_prefix", "none"):
        fastprefix.attach(model, PrefixConfig(P, position_offset=offset))  # type: ignore[arg-type]
        seen.clear()
        model(input_ids=ids)
        assert seen[0].flatten()[0] == (P if offset == "after_prefix" else 0)
        fastprefix.detach(model)


def test_several_prefixes_on_one_model(model: Any, ids: torch.Tensor) -> None:
    bare = model(input_ids=ids).logits
    outputs = {}
    for name, tokens in (("a", 3), ("b", 8)):
        fastprefix.attach(model, PrefixConfig(tokens, init=init.normal(0.5)), name)
        outputs[name] = model(input_ids=ids).logits
    assert all(p.requires_grad for n, p in model.named_parameters() if ".fastprefix." in n)
    for name in ("a", "b", "a"):
        fastprefix.set_prefix(model, name)
        assert torch.equal(model(input_ids=ids).logits, outputs[name])
    fastprefix.set_prefix(model, None)
    assert torch.equal(model(input_ids=ids).logits, bare)
    with pytest.raises(ValueError, match=r"name: got 'c', expected None or one of \['a', 'b'\]"):
        fastprefix.set_prefix(model, "c")


def test_two_models_of_one_config_object(ids: torch.Tensor) -> None:
    first = ROWS["llama_gqa"].build()
    second = type(first)(first.config).eval()
    before = second(input_ids=ids).logits
    fastprefix.attach(first, PrefixConfig(P, init=init.normal(0.5)))
    assert second.config._attn_implementation == "sdpa"
    assert torch.equal(second(input_ids=ids).logits, before)


def test_a_deep_copy_is_a_model_of_its_own(model: Any, ids: torch.Tensor) -> None:
    prefix = fastprefix.attach(model, PrefixConfig(P, init=init.normal(0.5)))
    twin = copy.deepcopy(model)
    want = model(input_ids=ids).logits
    assert torch.equal(twin(input_ids=ids).logits, want)
    with torch.no_grad():
        for parameter in prefix.parameters():
            parameter.zero_()
    assert torch.equal(twin(input_ids=ids).logits, want)
    fastprefix.detach(twin)
    assert not torch.equal(model(input_ids=ids).logits, want)
    restored = pickle.loads(pickle.dumps(model))
    assert torch.equal(restored(input_ids=ids).logits, model(input_ids=ids).logits)


def test_moving_the_model_moves_the_prefix(model: Any, ids: torch.Tensor) -> None:
    prefix = fastprefix.attach(model, PrefixConfig(P))
    model.double()
    assert {p.dtype for p in prefix.parameters()} == {torch.float64}
    assert model(input_ids=ids).logits.dtype == torch.float64


def test_frozen_before_stays_frozen_after_detach(model: Any) -> None:
    model.lm_head.weight.requires_grad_(False)
    fastprefix.attach(model, PrefixConfig(P))
    fastprefix.detach(model)
    assert not model.lm_head.weight.requires_grad and model.model.norm.weight.requires_grad


def test_a_layer_that_skips_the_hook_is_an_error(model: Any, ids: torch.Tensor) -> None:
    fastprefix.attach(model, PrefixConfig(P))
    attention = model.model.layers[1].self_attn
    attention.forward = lambda hidden_states, **kw: (hidden_states, None)
    for layer in model.model.layers:
        layer.self_attn.fastprefix.ran = False
    with pytest.raises(RuntimeError, match=r"without the attention hook of layers \[1\]"):
        model(input_ids=ids)


def test_a_4d_mask_of_the_users_own_is_the_whole_truth(model: Any, ids: torch.Tensor) -> None:
    fastprefix.attach(model, PrefixConfig(P, init=init.normal(0.5)))
    want = model(input_ids=ids).logits
    tril = torch.ones(S, S).tril().bool()[None, None]
    position_ids = torch.arange(S)[None]
    for mask in (
        tril,
        tril.expand(2, 1, S, S),
        torch.zeros(1, 1, S, S).masked_fill(~tril, torch.finfo(torch.float32).min),
    ):
        got = model(input_ids=ids, attention_mask=mask, position_ids=position_ids).logits
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    everything = torch.ones(2, 1, 1, S, dtype=torch.bool)
    assert not torch.allclose(
        model(input_ids=ids, attention_mask=everything, position_ids=position_ids).logits, want, atol=1e-3
    )


def test_explain_a_model(model: Any) -> None:
    fastprefix.attach(model, PrefixConfig(P, layers=[0]), "mine")
    text = fastprefix.explain(model)
    assert "prefix 'mine': active, P=6, 1 of 2 layers" in text
    assert "model.layers.0.self_attn: H=4 H_kv=2 D=8 P=6" in text and "layers.1.self_attn: H=4 H_kv=2 D=8 P=0" in text
    assert "chosen by auto" in text
    fastprefix.set_prefix(model, None)
    assert "no prefix is active" in fastprefix.explain(model)


WRONG_CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "no tokens": ({"num_virtual_tokens": 0}, "num_virtual_tokens: got 0, expected an int of at least 1"),
    "hidden without mlp": (
        {"num_virtual_tokens": 4, "encoder_hidden_size": 8},
        "encoder_hidden_size: got 8, expected None",
    ),
    "init": ({"num_virtual_tokens": 4, "init": "text"}, "init: got 'text', expected what fastprefix.init"),
    "offset": ({"num_virtual_tokens": 4, "position_offset": "before"}, "position_offset: got 'before'"),
    "frozen": (
        {"num_virtual_tokens": 4, "num_frozen_tokens": 5},
        "num_frozen_tokens: got 5, expected 0..num_virtual_tokens = 4",
    ),
    "frozen mlp": ({"num_virtual_tokens": 4, "num_frozen_tokens": 1, "prefix_projection": True}, "num_frozen_tokens"),
    "layers twice": ({"num_virtual_tokens": 4, "layers": [1, 1]}, "layers: got"),
}


@pytest.mark.parametrize("what", WRONG_CONFIGS)
def test_wrong_config(what: str) -> None:
    fields, message = WRONG_CONFIGS[what]
    with pytest.raises(ValueError, match=message):
        PrefixConfig(**fields)


def test_wrong_calls(model: Any) -> None:
    with pytest.raises(ValueError, match="model: got Linear, expected a transformers PreTrainedModel"):
        fastprefix.attach(torch.nn.Linear(2, 2), PrefixConfig(P))
    with pytest.raises(ValueError, match=r"config: got int, expected a fastprefix\.PrefixConfig"):
        fastprefix.attach(model, 16)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"layers: got 2, expected an index in 0\.\.1"):
        fastprefix.attach(model, PrefixConfig(P, layers=[2]))
    wrong = init.kv([torch.randn(2, P, 4)] * 2, [torch.randn(2, P, 4)] * 2)
    for projected in (False, True):
        with pytest.raises(
            ValueError, match=r"keys: got shape \[2, 6, 4\], expected \[H_kv, P, D\] = \[2, 6, 8\] in layer 0"
        ):
            fastprefix.attach(model, PrefixConfig(P, init=wrong, prefix_projection=projected))
    assert not hasattr(model, "_fastprefix") and model.config._attn_implementation == "sdpa"
    for call in (fastprefix.detach, fastprefix.explain, lambda m: fastprefix.set_prefix(m, None)):
        with pytest.raises(ValueError, match="model: got LlamaForCausalLM without a prefix"):
            call(model)
    fastprefix.attach(model, PrefixConfig(P))
    with pytest.raises(ValueError, match=r"name: got 'default', expected a new one"):
        fastprefix.attach(model, PrefixConfig(P))
    for name in ("a.b", "", "keys", 3):
        with pytest.raises(ValueError, match="name: got"):
            fastprefix.attach(model, PrefixConfig(P), name)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="output_attentions: got True"):
        model(input_ids=torch.ones(1, 3, dtype=torch.long), output_attentions=True)
    for bad, message in (
        (init.text, "prompt: got ''"),
        (init.token_ids, "ids: got no tokens"),
        (init.normal, "std: got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            bad(*{init.text: ("", lambda t: {"input_ids": []}), init.token_ids: ([],), init.normal: (0,)}[bad])  # type: ignore[operator]
    with pytest.raises(ValueError, match="keys: got int"):
        init.kv(3)
