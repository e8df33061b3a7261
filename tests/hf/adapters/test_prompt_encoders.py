"""P-tuning: soft prompts that are the output of an MLP or an LSTM, as PEFT's, trained, baked and copied."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastprefix
from fastprefix import PromptConfig, init
from fastprefix.prefixes.encoders.prompt_encoder import PromptEncoder
from tests.model_zoo.architectures import ROWS
from tests.support.model_error_rule import StayingInDouble, assert_model_rule
from tests.support.soft_prompts import concatenated, padded, tokens

P, S = 5, 7
KINDS: dict[str, dict[str, Any]] = {
    "mlp": {"encoder": "mlp", "encoder_hidden_size": 11},
    "lstm": {"encoder": "lstm", "encoder_hidden_size": 10},
    "deep": {"encoder": "lstm", "encoder_hidden_size": 12, "encoder_num_layers": 3},
}
DROPOUT = {"encoder": "lstm", "encoder_hidden_size": 10, "encoder_dropout": 0.5}
parametrize = pytest.mark.parametrize("kind", KINDS)


def encoded(options: dict[str, Any], dtype: torch.dtype = torch.float64, row: str = "llama_gqa") -> tuple[Any, Any]:
    """A model with a soft prompt through an encoder, whose output has numbers as large as other embeddings'."""
    model = ROWS[row].build(dtype)
    d = model.get_input_embeddings().weight.shape[1]
    torch.manual_seed(3)
    prompt = fastprefix.attach(model, PromptConfig(P, init=init.embeddings(torch.randn(P, d)), **options))
    prompt.to(dtype)
    return model, prompt


def step(model: Any, prompt: Any, **options: Any) -> tuple[Tensor, list[Tensor]]:
    """A step's loss and the gradients of the prompt's parameters."""
    ids = tokens()
    loss = model(input_ids=ids, labels=ids, **options).loss
    return loss, list(torch.autograd.grad(loss, list(prompt.parameters())))


@parametrize
@pytest.mark.parametrize("side", ["none", "right"])
def test_computes_what_peft_computes(kind: str, side: str) -> None:
    peft = pytest.importorskip("peft")
    options = dict(KINDS[kind])
    theirs_are = {"encoder_reparameterization_type": options.pop("encoder").upper(), **options}
    config = peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=P, **theirs_are)
    theirs = peft.get_peft_model(ROWS["llama_gqa"].build(), config)
    encoder = theirs.prompt_encoder["default"]
    model = ROWS["llama_gqa"].build()
    prompt = fastprefix.attach(model, PromptConfig(P, **KINDS[kind]))
    assert {n: x.shape for n, x in prompt.encoder.state_dict().items()} == {
        n: x.shape for n, x in encoder.state_dict().items()
    }
    prompt.encoder.load_state_dict(encoder.state_dict())
    torch.testing.assert_close(prompt(), theirs.get_prompt(1)[0])
    ids, mask = tokens(), padded("right") if side == "right" else torch.ones_like(tokens())
    labels = ids.masked_fill(mask == 0, -100)
    got = model(input_ids=ids, attention_mask=mask, labels=labels)
    want = theirs(input_ids=ids, attention_mask=mask, labels=labels)
    torch.testing.assert_close(got.loss, want.loss)
    got.loss.backward(), want.loss.backward()
    wanted = {name: p.grad for name, p in encoder.named_parameters()}
    for name, p in prompt.encoder.named_parameters():
        torch.testing.assert_close(p.grad, wanted[name], rtol=1e-3, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
        assert p.grad.abs().max() > 0


@parametrize
def test_starts_as_pefts_does(kind: str) -> None:
    """At random: the input is N(0, 1), weights are those of nn.Linear and nn.LSTM. Both draw in the same order."""
    peft = pytest.importorskip("peft")
    options = dict(KINDS[kind])
    theirs_are = {"encoder_reparameterization_type": options.pop("encoder").upper(), **options}
    config = peft.PromptEncoderConfig(num_virtual_tokens=P, token_dim=32, num_transformer_submodules=1, **theirs_are)
    torch.manual_seed(5)
    want = peft.PromptEncoder(config).state_dict()
    torch.manual_seed(5)
    got = PromptConfig(P, **KINDS[kind]).new_encoder(32).state_dict()
    assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)


@parametrize
@pytest.mark.parametrize("row", ["llama_gqa", "gpt2"])
def test_equals_its_output_concatenated(kind: str, row: str) -> None:
    model, prompt = encoded(KINDS[kind], row=row)
    bare = ROWS[row].build(torch.float64)
    bare.set_attn_implementation("eager")
    ids = tokens()

    def oracle() -> list[Tensor]:
        want = concatenated(bare, prompt(), ids, labels=ids)
        return [want.logits[:, P:], want.loss, *torch.autograd.grad(want.loss, list(prompt.parameters()))]

    eager = oracle()
    with StayingInDouble():
        truth = oracle()
    got = model(input_ids=ids, labels=ids)
    got.loss.backward()
    assert_model_rule([got.logits, got.loss, *(p.grad for p in prompt.parameters())], eager, truth)


@parametrize
def test_runs_once_per_forward(kind: str) -> None:
    model, prompt = encoded(KINDS[kind])
    seen: list[int] = []
    prompt.encoder.register_forward_hook(lambda *args: seen.append(1))
    step(model, prompt)
    assert seen == [1]
    model.generate(tokens(), max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert seen == [1, 1]


@parametrize
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(kind: str, reentrant: bool) -> None:
    model, prompt = encoded(KINDS[kind])
    model.train()
    ids = tokens()
    want = step(model, prompt)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    torch.testing.assert_close((loss, [p.grad for p in prompt.parameters()]), want)


@parametrize
def test_a_copy_trains_its_own_encoder(kind: str) -> None:
    model, prompt = encoded(KINDS[kind])
    twin = copy.deepcopy(model)
    copied = twin._fastprefix.selection.prefixes["default"]
    assert not {id(p) for p in copied.parameters()} & {id(p) for p in prompt.parameters()}
    assert {id(p) for p in copied.parameters()} <= {id(p) for p in twin.parameters()}
    want = step(model, prompt)
    with torch.no_grad():
        for p in prompt.parameters():
            p.zero_()
    torch.testing.assert_close(step(twin, copied), want)


def test_rows_of_a_batch_read_prompts_of_their_own() -> None:
    model, prompt = encoded(KINDS["mlp"])
    other = fastprefix.attach(model, PromptConfig(3, **KINDS["lstm"]), "other").to(torch.float64)
    plain = fastprefix.attach(model, PromptConfig(4), "plain").to(torch.float64)
    ids = tokens()
    with fastprefix.prefix_batch(model, ["other", "default", "plain"]):
        got = model(input_ids=ids).logits
    prompts = {"other": other, "default": prompt, "plain": plain}
    for row, name in enumerate(prompts):
        fastprefix.set_prefix(model, name)
        torch.testing.assert_close(got[row], model(input_ids=ids[row : row + 1]).logits[0])
    got.square().mean().backward()
    assert all(p.grad.abs().max() > 0 for p in (*other.parameters(), *prompt.parameters()))


@parametrize
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_baked_is_live_bit_for_bit(kind: str, dtype: torch.dtype) -> None:
    model, prompt = encoded(KINDS[kind], dtype)
    ids = tokens()
    live = prompt().detach().clone()
    with torch.no_grad():
        assert torch.equal(prompt(), live)
        want = model(input_ids=ids).logits
    with torch.inference_mode():
        assert torch.equal(prompt(), live)
    assert fastprefix.bake(model) is prompt and prompt.encoder is None
    assert torch.equal(prompt(), live) and prompt.embedding.dtype == dtype
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, want)
    assert [p for p in model.parameters() if p.requires_grad] == [prompt.embedding]
    assert step(model, prompt)[1][0].abs().max() > 0
    fastprefix.bake(model)
    assert torch.equal(prompt(), live)


def test_dropout_is_drawn_once_and_in_training_alone() -> None:
    model, prompt = encoded(DROPOUT)
    assert not model.training
    ids = tokens()[:1].expand(3, -1)
    still = prompt().detach()
    assert torch.equal(prompt(), still)  # attached to a model in eval mode
    model.train()
    assert not torch.equal(prompt(), prompt())
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the prompt is not concatenated
        logits = model(input_ids=ids).logits
    torch.testing.assert_close(logits[1:], logits[:-1])
    twin = ROWS["llama_gqa"].build(torch.float64)
    start = fastprefix.attach(twin, PromptConfig(init=init.slice(prompt)))
    torch.testing.assert_close(start().double(), still, rtol=1e-6, atol=1e-6)
    fastprefix.bake(model)
    assert torch.equal(prompt(), still)


@parametrize
def test_an_init_is_fitted(kind: str) -> None:
    model = ROWS["llama_gqa"].build()
    want = model.get_input_embeddings().weight[[5, 6, 7]].clone()
    prompt = fastprefix.attach(model, PromptConfig(init=init.token_ids([5, 6, 7]), **KINDS[kind]))
    torch.testing.assert_close(prompt(), want, rtol=1e-3, atol=1e-5)
    said = r"init: an (MLP|LSTM) of 1 hidden units cannot give the embeddings of 9 .*_size=18 or more usually can"
    with pytest.warns(UserWarning, match=said):
        narrow = PromptConfig(9, init=init.vocabulary(), **{**KINDS[kind], "encoder_hidden_size": 1})
        fastprefix.attach(ROWS["llama_gqa"].build(), narrow)


@parametrize
def test_tools_for_linear_layers_leave_it_alone(kind: str) -> None:
    peft = pytest.importorskip("peft")
    model, prompt = encoded(KINDS[kind])
    assert not any(isinstance(m, nn.Linear | nn.LSTM | nn.Embedding) for m in prompt.modules())
    want = prompt().detach()
    lora = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    assert any("lora_" in name for name, _ in lora.named_parameters())
    assert not any("lora_" in name for name, _ in prompt.named_parameters())
    assert torch.equal(prompt(), want)


@pytest.mark.slow
@parametrize
def test_compiles(kind: str) -> None:
    torch._dynamo.reset()
    model, prompt = encoded(KINDS[kind], torch.float64)
    ids = tokens()
    want = step(model, prompt, use_cache=False)
    loss = torch.compile(model, fullgraph=True, backend="aot_eager")(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    torch.testing.assert_close((loss, [p.grad for p in prompt.parameters()]), want, rtol=1e-6, atol=1e-9)


def test_explain_names_it() -> None:
    model, prompt = encoded(KINDS["lstm"])
    count = sum(p.numel() for p in prompt.parameters())
    told = fastprefix.explain(model)
    assert told.startswith(f"soft prompt through an LSTM 'default': active, P=5, input embeddings, {count:,} trainable")


def test_the_hidden_size_is_the_models_unless_given() -> None:
    model = ROWS["llama_gqa"].build()
    prompt = fastprefix.attach(model, PromptConfig(P, encoder="mlp"))
    assert isinstance(prompt.encoder, PromptEncoder) and prompt.encoder.mlp_head[0].weight.shape == (32, 32)
    assert prompt.embedding is prompt.encoder.embedding.weight and prompt.embedding.shape == (P, 32)
    fastprefix.detach(model)
    assert "fastprefix" not in str(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoder": "MLP"}, "encoder: got 'MLP', expected 'mlp', 'lstm' or None"),
        ({"encoder_hidden_size": 4}, "encoder_hidden_size: got 4, expected None, or an encoder beside it"),
        ({"encoder": "mlp", "encoder_hidden_size": 0}, "encoder_hidden_size: got 0, expected an int of at least 1"),
        ({"encoder": "mlp", "encoder_num_layers": 3}, "encoder_num_layers: got 3, expected 2, or encoder='lstm'"),
        ({"encoder": "lstm", "encoder_num_layers": 0}, "encoder_num_layers: got 0, expected an int of at least 1"),
        ({"encoder": "mlp", "encoder_dropout": 0.1}, "encoder_dropout: got 0.1, expected 0.0, or an LSTM of several"),
        ({"encoder": "lstm", "encoder_num_layers": 1, "encoder_dropout": 0.1}, "encoder_dropout: got 0.1, expected"),
        ({"encoder": "lstm", "encoder_dropout": 1.0}, "encoder_dropout: got 1.0, expected a number from 0 to below 1"),
    ],
)
def test_wrong_configurations(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PromptConfig(P, **options)
