"""Reading a whole text, and the start that is fitted to it, against the text itself in front of a row; fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers")

import fastprefix  # noqa: E402
from fastprefix.cartridges import start  # noqa: E402
from fastprefix.cartridges.reading import reading  # noqa: E402

SIZES = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
T, P = 20, 6
TEXT = [(7 * i) % 29 + 3 for i in range(T)]
ROW = torch.tensor([[5, 9, 4, 30, 8]])


def model_of(kind: str, **options: Any) -> Any:
    torch.manual_seed(0)
    if kind == "gpt2":  # learned positions
        config = transformers.GPT2Config(vocab_size=32, n_embd=32, n_layer=2, n_head=4, n_positions=64)
        return transformers.GPT2LMHeadModel(config).double().eval()
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **options})
    return getattr(transformers, f"{kind}ForCausalLM")(config).double().eval()


@torch.no_grad()
def after_text(model: Any, positions: Tensor | None = None) -> Tensor:
    """The row's logits behind the text itself."""
    ids = torch.cat([torch.tensor([TEXT]), ROW], 1)
    logits: Tensor = model(ids, position_ids=positions).logits[:, T:]
    return logits


@torch.no_grad()
def logits_of(model: Any) -> Tensor:
    logits: Tensor = model(ROW).logits
    return logits


@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "gpt2"])
def test_rows_after_it_compute_what_they_compute_after_the_text(kind: str) -> None:
    model = model_of(kind)
    # Where positions are learned, the content's are those behind the shorter prefix.
    positions = torch.cat([torch.arange(T), P + torch.arange(ROW.shape[1])])[None] if kind == "gpt2" else None
    expected, bare = after_text(model, positions), logits_of(model)
    with reading(model, TEXT, P):
        torch.testing.assert_close(
            logits_of(model), expected, rtol=0, atol=1e-4
        )  # the prefix and rotary tables are in fp32
        greedy = model.generate(ROW, attention_mask=torch.ones_like(ROW), max_new_tokens=4, pad_token_id=0)
    assert torch.equal(logits_of(model), bare) and all(p.requires_grad for p in model.parameters())
    if kind != "gpt2":
        ids = torch.cat([torch.tensor([TEXT]), ROW], 1)
        mask = torch.ones_like(ids)
        assert torch.equal(greedy, model.generate(ids, attention_mask=mask, max_new_tokens=4, pad_token_id=0)[:, T:])


@pytest.mark.parametrize("mass", ["keys", "bias", "none"])
@pytest.mark.parametrize("kind", ["Llama", "Qwen2"])
def test_a_start_of_as_many_tokens_as_the_text_is_the_text(kind: str, mass: str) -> None:
    model = model_of(kind)
    expected = after_text(model)
    found = fastprefix.attention_matching(model, TEXT, T, mass=mass)
    assert (found.biases is not None) == (mass == "bias")
    config = fastprefix.PrefixConfig(init=found, num_frozen_tokens=1, prefix_bias=mass == "bias")
    fastprefix.attach(model, config)
    torch.testing.assert_close(logits_of(model), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("mass", ["keys", "bias"])
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("kind", ["Llama", "Qwen2"])
def test_a_short_one_is_closer_to_the_text_than_its_first_tokens(kind: str, seed: int, mass: str) -> None:
    model, draw = model_of(kind, initializer_range=0.1), torch.Generator().manual_seed(seed)
    text, row = (torch.randint(3, 32, (1, n), generator=draw) for n in (T, 12))
    with torch.no_grad():
        expected = model(torch.cat([text, row], 1)).logits[:, T:].log_softmax(-1)

    def divergence(init: fastprefix.init.Init) -> float:
        fastprefix.attach(model, fastprefix.PrefixConfig(init=init, prefix_bias=init.biases is not None))
        with torch.no_grad():
            found = model(row).logits.log_softmax(-1)
        fastprefix.detach(model)
        return float((expected.exp() * (expected - found)).sum(-1).mean())

    matched = fastprefix.attention_matching(model, text, P, mass=mass)
    assert divergence(matched) < 0.5 * divergence(fastprefix.init.token_ids(text[0, :P]))


def test_queries_are_those_of_all_heads_of_a_group_at_the_contents_positions() -> None:
    model = model_of("Llama")
    with reading(model, TEXT, P):
        found = start.record_queries(model, [ROW[0].tolist()])
    layer = model.model.layers[0]
    hidden = layer.input_layernorm(model.model.embed_tokens(ROW))
    q = layer.self_attn.q_proj(hidden).unflatten(-1, (4, 8)).transpose(1, 2)  # [1, H, S, D]
    cos, sin = model.model.rotary_emb(hidden, P + torch.arange(ROW.shape[1])[None])
    q = transformers.models.llama.modeling_llama.apply_rotary_pos_emb(q, q, cos, sin)[0]
    torch.testing.assert_close(found[0][0], q[0].unflatten(0, (2, 2)).flatten(1, 2))
    assert found[0][1] == 8**-0.5


def test_a_string_is_read_with_its_tokenizer_and_prefixes_stay() -> None:
    model = model_of("Llama")
    fastprefix.attach(model, fastprefix.PrefixConfig(2), "mine")
    before = logits_of(model)

    def tokenizer(text: str) -> dict[str, list[int]]:
        return {"input_ids": [ord(x) % 30 for x in text]}

    found = fastprefix.attention_matching(model, "a text of letters", 4, tokenizer=tokenizer)
    ids = tokenizer("a text of letters")["input_ids"]
    other = fastprefix.attention_matching(model, ids, 4)
    assert found.keys is not None and other.keys is not None and found.length == 4
    assert all(torch.equal(a, b) for a, b in zip(found.keys, other.keys, strict=True))
    assert torch.equal(logits_of(model), before)


def test_pieces_of_a_text_are_spread_over_it() -> None:
    pieces = start.again(range(1000), 512)
    assert [piece[0] for piece in pieces] == [0, 291, 581, 872] and all(len(piece) == 128 for piece in pieces)
    assert pieces[-1][-1] == 999 and start.again([1, 2, 3]) == [[1, 2, 3]]


WRONG: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "no tokens": ("Llama", {}, {"tokens": 0}, "tokens: got 0, expected 1 to 20, the tokens of the text"),
    "too many": ("Llama", {}, {"tokens": T + 1}, "tokens: got 21"),
    "no text": ("Llama", {}, {"text": []}, "text: got no tokens"),
    "no tokenizer": ("Llama", {}, {"text": "a"}, "tokenizer: got None"),
    "no mass": ("Llama", {}, {"mass": "all"}, "mass: got 'all', expected 'bias', 'keys' or 'none'"),
    "no queries": ("Llama", {}, {"queries": []}, "queries: got no rows"),
    "a window": ("Mistral", {"sliding_window": 8}, {}, "text: got 20 tokens for layers with a window of 8"),
    "a cap": ("Gemma2", {"head_dim": 8, "sliding_window": 64}, {}, r"model: got one that caps its scores"),
}


@pytest.mark.parametrize(("kind", "options", "given", "message"), WRONG.values(), ids=WRONG)
def test_wrong_calls_are_named_and_leave_the_model_alone(
    kind: str, options: dict[str, Any], given: dict[str, Any], message: str
) -> None:
    model = model_of(kind, **options)
    before = logits_of(model)
    with pytest.raises(ValueError, match=message):
        fastprefix.attention_matching(model, **{"text": TEXT, "tokens": P, **given})
    assert torch.equal(logits_of(model), before)
    assert not [name for name, _ in model.named_modules() if "fastprefix" in name]


def test_an_encoder_decoder_is_refused() -> None:
    config = transformers.T5Config(vocab_size=32, d_model=16, d_kv=8, num_layers=1, num_heads=2, d_ff=16)
    model = transformers.T5ForConditionalGeneration(config).eval()
    with pytest.raises(ValueError, match="expected a causal language model, without an encoder"):
        fastprefix.attention_matching(model, TEXT, P)
