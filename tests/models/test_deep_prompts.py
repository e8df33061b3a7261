"""Prefixes in encoders with a head that is trained along (P-tuning v2), and mean pooling of a text after a prompt."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import fastprefix
from fastprefix import PrefixConfig, PromptConfig
from tests.model_zoo.encoder_decoders import key_values
from tests.model_zoo.row import VOCAB
from tests.support.concat_oracle import run_concat
from tests.support.model_error_rule import StayingInDouble, assert_model_rule

P, B, S = 5, 3, 7
HEADS = ["BertForSequenceClassification", "BertForTokenClassification"]
pytestmark = pytest.mark.filterwarnings("ignore:fastprefix. the prompt is concatenated")


def bert(cls: str) -> Any:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=32, num_labels=3, initializer_range=0.3,
    )  # fmt: skip
    return getattr(transformers, cls)(config).eval().double()


def rows() -> dict[str, Tensor]:
    """Token ids and mask, padded on the right."""
    torch.manual_seed(1)
    mask = torch.ones(B, S, dtype=torch.long)
    mask[1, 4:] = mask[2, 6:] = 0
    return {"input_ids": torch.randint(3, VOCAB, (B, S)).masked_fill(mask == 0, 0), "attention_mask": mask}


@pytest.mark.parametrize("cls", HEADS)
def test_a_head_trains_with_the_prefix(cls: str) -> None:
    """Logits, loss and gradients of prefix and head are those of concatenation; the rest is frozen."""
    model = bert(cls)
    bare = copy.deepcopy(model)
    config = PrefixConfig(P, init=fastprefix.init.normal(0.6), modules_to_save=["classifier"])
    prefix = fastprefix.attach(model, config).double()
    inputs = rows()
    labels = torch.tensor([0, 2, 1]) if "Sequence" in cls else (inputs["input_ids"] % 3)
    labels = labels if "Sequence" in cls else labels.masked_fill(inputs["attention_mask"] == 0, -100)
    pairs = key_values(model, prefix, leaves=True)
    got = model(**inputs, labels=labels)
    head = list(prefix.modules_to_save.named()["classifier"].parameters())
    trained = [x for layer in prefix.layers for x in (layer.k, layer.v)]
    grads = torch.autograd.grad(got.loss, [*trained, *head])
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in (*trained, *head)}
    bare.requires_grad_(False)
    positions = torch.arange(P, P + S)[None]

    def oracle() -> list[Tensor]:
        seen: list[Any] = []
        keep = bare.classifier.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
        try:
            want = run_concat(bare, pairs, **inputs, labels=labels, position_ids=positions)
        finally:
            keep.remove()
        hidden, logits = seen[-1]
        leaves = [x for kv in pairs.values() for x in kv]
        *of_prefix, of_logits = torch.autograd.grad(want.loss, [*leaves, logits])
        weight = torch.einsum("...c,...d->cd", of_logits, hidden)
        return [want.logits, want.loss, *of_prefix, weight, of_logits.flatten(0, -2).sum(0)]

    eager = oracle()
    with StayingInDouble():
        truth = oracle()
    assert_model_rule([got.logits, got.loss, *grads], eager, truth)
    assert all(x.abs().max() > 0 for x in grads)


@pytest.mark.parametrize("cls", HEADS)
def test_prefix_and_head_learn(cls: str) -> None:
    model, inputs = bert(cls), rows()
    labels = torch.tensor([0, 2, 1]) if "Sequence" in cls else inputs["input_ids"] % 3
    fastprefix.attach(model, PrefixConfig(P, modules_to_save=["classifier"]))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(40):
        loss = model(**inputs, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


def mean_pooled(hidden: Tensor, mask: Tensor) -> Tensor:
    """A sentence's embedding, as sentence-transformers' mean pooling: ``[B, d]``."""
    return (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


@pytest.mark.parametrize("kind", ["prefix", "soft prompt"])
def test_mean_pooling_counts_the_content_alone(kind: str) -> None:
    """Hidden states have the mask's places: padded rows pool to what each row has alone, with concatenation by hand."""
    model, inputs = bert("BertModel"), rows()
    bare = copy.deepcopy(model)
    start = fastprefix.init.normal(1.0)
    prefix: Any = fastprefix.attach(
        model, PrefixConfig(P, init=start) if kind == "prefix" else PromptConfig(P, init=start)
    ).double()
    hidden = model(**inputs).last_hidden_state
    assert hidden.shape[:2] == inputs["attention_mask"].shape
    got = mean_pooled(hidden, inputs["attention_mask"])
    for i, real in enumerate(inputs["attention_mask"].bool()):
        ids = inputs["input_ids"][i : i + 1, real]
        if kind == "prefix":
            shifted = torch.arange(P, P + ids.shape[1])[None]
            alone = run_concat(bare, key_values(model, prefix), input_ids=ids, position_ids=shifted).last_hidden_state
        else:
            whole = torch.cat([prefix.embedding[None], bare.get_input_embeddings()(ids)], 1)
            alone = bare(inputs_embeds=whole).last_hidden_state[:, P:]
        torch.testing.assert_close(got[i], alone[0].mean(0), rtol=1e-6, atol=1e-9)
