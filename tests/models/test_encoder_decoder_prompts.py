"""Soft prompts in front of an encoder-decoder's source: equal to embeddings concatenated by hand, in fp64."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastprefix
from fastprefix import PrefixConfig, PromptConfig
from tests.model_zoo.encoder_decoders import ALL, ROWS, S, T, batch, count_hooks, source
from tests.model_zoo.inputs import gradients, without_dropout
from tests.support.model_error_rule import StayingInDouble, assert_model_rule

P, B = 5, 3
READS_TOKENS = [name for name in ALL if name != "whisper"]
SIDES = ("none", "left", "right")
pytestmark = pytest.mark.filterwarnings("ignore:fastprefix. the prompt is concatenated")


def prompted(name: str, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[Any, Any, Any]:
    """A bare model with eager attention, a copy of it with a soft prompt, and the prompt."""
    bare = ALL[name].build(dtype)
    model = copy.deepcopy(bare)
    bare.set_attn_implementation("eager")
    prompt = fastprefix.attach(model, PromptConfig(P, init=fastprefix.init.normal(1.0), **options))
    return bare, model, prompt.to(dtype)


def rows(name: str, side: str) -> dict[str, Tensor]:
    """Sources ``[3, T]`` padded on a side, labels ``[3, S]``."""
    inputs = {"input_ids": batch(name)["input_ids"], "labels": batch(name)["decoder_input_ids"]}
    if side != "none":
        mask = torch.ones(B, T, dtype=torch.long)
        mask[0, slice(0, 4) if side == "left" else slice(T - 4, T)] = 0
        mask[2, slice(0, 1) if side == "left" else slice(T - 1, T)] = 0
        inputs.update(attention_mask=mask, input_ids=inputs["input_ids"].masked_fill(mask == 0, 0))
    return inputs


def concatenated(bare: Any, embedding: Tensor, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The bare model's inputs: in each row the prompt's embeddings right before the first real token's."""
    ids = inputs["input_ids"]
    mask = inputs.get("attention_mask", torch.ones_like(ids))
    own = bare.get_encoder().get_input_embeddings()(ids)
    embeds, masks = [], []
    for row, real in zip(own, mask, strict=True):
        n = int(real.argmax())
        embeds.append(torch.cat([row[:n], embedding.to(row.dtype), row[n:]]))
        masks.append(torch.cat([real[:n], real.new_ones(len(embedding)), real[n:]]))
    rest = {k: x for k, x in inputs.items() if k not in ("input_ids", "attention_mask")}
    return {"inputs_embeds": torch.stack(embeds), "attention_mask": torch.stack(masks), **rest}


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", READS_TOKENS)
def test_equals_concatenated_embeddings(name: str, side: str) -> None:
    """Logits, loss and the gradient of every number of the prompt."""
    bare, model, prompt = prompted(name)
    inputs = rows(name, side)

    def oracle() -> list[Tensor]:
        twin = prompt.embedding.detach().clone().requires_grad_()
        want = bare(**concatenated(bare, twin, inputs))
        return [want.logits, want.loss, *torch.autograd.grad(want.loss, [twin])]

    eager = oracle()
    with StayingInDouble():
        truth = oracle()
    got = model(**inputs)
    got.loss.backward()
    assert_model_rule([got.logits, got.loss, prompt.embedding.grad], eager, truth)
    assert (prompt.embedding.grad.abs().sum(-1) > 0).all()
    assert got.logits.shape[:2] == (B, S)
    assert all(p.grad is None for p in model.parameters() if p is not prompt.embedding)


def test_left_padding_leaves_t5_s_rows_as_they_are() -> None:
    """Distances from the prompt to the tokens are those without padding: positions are relative."""
    _, model, _ = prompted("t5")
    inputs = rows("t5", "left")
    got = model(**inputs).logits
    for i, mask in enumerate(inputs["attention_mask"].bool()):
        alone = model(input_ids=inputs["input_ids"][i : i + 1, mask], labels=inputs["labels"][i : i + 1]).logits
        torch.testing.assert_close(got[i : i + 1], alone, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", ["t5", "bart", "marian"])
def test_generate_equals_concatenated_embeddings(name: str, beams: int) -> None:
    bare, model, prompt = prompted(name)
    inputs = rows(name, "right")
    inputs.pop("labels")
    options: dict[str, Any] = {
        "max_new_tokens": 7, "num_beams": beams, "do_sample": False, "eos_token_id": None,
        "output_scores": True, "return_dict_in_generate": True,
    }  # fmt: skip
    got = model.generate(**inputs, **options)
    want = bare.generate(**concatenated(bare, prompt.embedding.detach(), inputs), **options)
    assert torch.equal(got.sequences, want.sequences)
    torch.testing.assert_close(torch.stack(got.scores), torch.stack(want.scores), rtol=1e-6, atol=1e-6)
    fastprefix.set_prefix(model, None)
    assert (torch.stack(model.generate(**inputs, **options).scores) - torch.stack(got.scores)).abs().max() > 0.01


@pytest.mark.parametrize("use_cache", [True, False])
def test_generates_without_a_mask(use_cache: bool) -> None:
    bare, model, prompt = prompted("t5")
    inputs = rows("t5", "none")
    inputs.pop("labels")
    options: dict[str, Any] = {"max_new_tokens": 4, "num_beams": 2, "do_sample": False, "use_cache": use_cache}
    got = model.generate(**inputs, **options)
    assert torch.equal(got, bare.generate(**concatenated(bare, prompt.embedding.detach(), inputs), **options))


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_a_prompt_for_each_row(name: str) -> None:
    _, model, _ = prompted(name, torch.float32)
    fastprefix.attach(model, PromptConfig(P, init=fastprefix.init.normal(1.0)), "other")
    inputs = rows(name, "right")
    inputs.pop("labels")
    options: dict[str, Any] = {"max_new_tokens": 6, "num_beams": 2, "do_sample": False, "eos_token_id": None}
    names = ["default", "other", "default"]
    with fastprefix.prefix_batch(model, names):
        got = model.generate(**inputs, **options)
    for i, one in enumerate(names):
        fastprefix.set_prefix(model, one)
        alone = model.generate(**{k: x[i : i + 1] for k, x in inputs.items()}, **options)
        assert torch.equal(got[i : i + 1], alone)
    with fastprefix.prefix_batch(model, [None, "other", "default"]), pytest.raises(ValueError, match="of one length"):
        model(**rows(name, "none"))


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant: bool) -> None:
    _, model, prompt = prompted("t5")
    inputs = {**rows("t5", "right"), "use_cache": False}
    without_dropout(model)
    model.train()
    want = gradients(model(**inputs).logits, [prompt.embedding])[0]
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    x = model(**inputs).logits
    (x * torch.sin(torch.arange(x.numel(), dtype=x.dtype)).view(x.shape)).sum().backward()
    torch.testing.assert_close(prompt.embedding.grad, want, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
def test_compiled() -> None:
    torch._dynamo.reset()
    _, model, prompt = prompted("bart", torch.float32)
    inputs = rows("bart", "right")
    x = model(**inputs, use_cache=False).logits
    y = torch.compile(model, backend="aot_eager")(**inputs, use_cache=False).logits
    torch.testing.assert_close(y, x, rtol=1e-4, atol=1e-4)
    got, want = (gradients(z, [prompt.embedding])[0] for z in (y, x))
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3 * want.abs().max().item())


@pytest.mark.parametrize("encoder", [None, "mlp", "lstm"])
def test_saved_and_loaded_here_and_by_peft(encoder: Any, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    bare, model, _ = prompted("bart", torch.float32, encoder=encoder)
    inputs = rows("bart", "right")
    want = model(**inputs).logits
    fastprefix.save(model, tmp_path)
    fastprefix.detach(model)
    prompt = fastprefix.load(model, tmp_path)
    assert torch.equal(model(**inputs).logits, want) and prompt.config.encoder == encoder  # type: ignore[union-attr]
    theirs = peft.PeftModel.from_pretrained(bare, tmp_path).eval()
    assert type(theirs).__name__ == "PeftModelForSeq2SeqLM"
    torch.testing.assert_close(theirs(**inputs).logits, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("submodules", [1, 2])
@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PromptEncoderConfig"])
def test_peft_s_files_are_loaded(kind: str, submodules: int, tmp_path: Path) -> None:
    """With two submodules PEFT saves embeddings for the decoder too, which it never reads."""
    peft = pytest.importorskip("peft")
    bare = ROWS["t5"].build()
    model = copy.deepcopy(bare)
    options = {"task_type": "SEQ_2_SEQ_LM", "num_virtual_tokens": P, "num_transformer_submodules": submodules}
    theirs = peft.get_peft_model(bare, getattr(peft, kind)(**options)).eval()
    inputs = rows("t5", "right")
    want = theirs(**inputs).logits
    theirs.save_pretrained(tmp_path)
    prompt = fastprefix.load(model, tmp_path)
    assert prompt.embedding.shape == (P, 32)  # type: ignore[union-attr]
    torch.testing.assert_close(model(**inputs).logits, want, rtol=1e-4, atol=1e-5)


def test_starts_from_tokens_and_finds_them_again() -> None:
    """Marian has an embedding for the source's tokens and one for the target's."""
    model = ROWS["marian"].build()
    prompt = fastprefix.attach(model, PromptConfig(init=fastprefix.init.token_ids([5, 6, 7])))
    assert torch.equal(prompt(), model.get_encoder().get_input_embeddings()(torch.tensor([5, 6, 7])))
    assert fastprefix.nearest_tokens(model).ids[:, 0].tolist() == [5, 6, 7]


def test_says_that_the_prompt_runs_with_every_row() -> None:
    _, model, _ = prompted("t5", torch.float32)
    with pytest.warns(UserWarning, match="not shared: T5Stack is bidirectional"):
        model(**rows("t5", "none"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**rows("t5", "none"))  # said once
    assert "concatenated: T5Stack is bidirectional: its prompt sees the row" in fastprefix.explain(model)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_detached_is_bit_for_bit_what_it_was(name: str) -> None:
    model, inputs = ROWS[name].build().requires_grad_(False), rows(name, "right")
    before, modules, hooks = model(**inputs).logits, [n for n, _ in model.named_modules()], count_hooks(model)
    fastprefix.attach(model, PromptConfig(P))
    assert not torch.equal(model(**inputs).logits, before)
    fastprefix.detach(model)
    assert torch.equal(model(**inputs).logits, before)
    assert [n for n, _ in model.named_modules()] == modules and count_hooks(model) == hooks


def test_states_that_were_made_beforehand() -> None:
    _, model, _ = prompted("t5")
    inputs = rows("t5", "left")
    want = model(**inputs).logits
    given = source({k: x for k, x in inputs.items() if k != "labels"})
    states = model.get_encoder()(**given)
    assert states[0].shape[1] == P + T
    rest = {"labels": inputs["labels"], "encoder_outputs": states}
    torch.testing.assert_close(model(attention_mask=inputs["attention_mask"], **rest).logits, want)
    assert model(**rest).logits.shape == want.shape  # the decoder has read these states before
    fastprefix.set_prefix(model, None)
    bare = model.get_encoder()(**given)
    fastprefix.set_prefix(model, "default")
    with pytest.raises(ValueError, match="encoder_outputs: got states without an attention_mask"):
        model(labels=inputs["labels"], encoder_outputs=bare)
    with pytest.raises(ValueError, match=f"encoder_outputs: got {T} states for an attention_mask of {T} tokens"):
        model(attention_mask=inputs["attention_mask"], labels=inputs["labels"], encoder_outputs=bare)


def test_the_wrong_call_says_what_was_wrong() -> None:
    with pytest.raises(ValueError, match="WhisperForConditionalGeneration, which reads input_features"):
        fastprefix.attach(ROWS["whisper"].build(), PromptConfig(P))
    _, model, _ = prompted("bart", torch.float32)
    fastprefix.attach(model, PrefixConfig(P), "prefix")
    with (
        fastprefix.prefix_batch(model, ["prefix", "default", "default"]),
        pytest.raises(ValueError, match="one length"),
    ):
        model(**rows("bart", "none"))
