"""Soft prompts in bidirectional encoders that count their tokens' places themselves, or run one layer several times."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import fastprefix
from fastprefix import PromptConfig
from tests.model_zoo.row import VOCAB
from tests.support.model_error_rule import StayingInDouble, assert_model_rule

P, B, S = 4, 3, 7
_T5 = {
    "vocab_size": VOCAB, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
    "relative_attention_num_buckets": 8, "num_labels": 3,
}  # fmt: skip
_ALBERT = {
    "vocab_size": VOCAB, "embedding_size": 16, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
    "intermediate_size": 48, "max_position_embeddings": 32, "num_labels": 3,
}  # fmt: skip
MODELS = {
    "T5EncoderModel": ("T5Config", _T5),
    "T5ForTokenClassification": ("T5Config", _T5),
    "MT5EncoderModel": ("MT5Config", _T5),
    "AlbertModel": ("AlbertConfig", _ALBERT),
    "AlbertForTokenClassification": ("AlbertConfig", _ALBERT),
    "AlbertForMaskedLM": ("AlbertConfig", _ALBERT),
}
pytestmark = pytest.mark.filterwarnings("ignore:fastprefix. the prompt is concatenated")


def prompted(name: str) -> tuple[Any, Any, Any]:
    """A bare model with eager attention, a copy of it with a soft prompt, and the prompt, in fp64."""
    torch.manual_seed(0)
    config, options = MODELS[name]
    bare = getattr(transformers, name)(getattr(transformers, config)(**options)).eval().double()
    model = copy.deepcopy(bare)
    bare.set_attn_implementation("eager")
    return bare, model, fastprefix.attach(model, PromptConfig(P, init=fastprefix.init.normal(1.0))).double()


def rows(side: str) -> tuple[Tensor, Tensor]:
    """Token ids and mask ``[B, S]``."""
    torch.manual_seed(1)
    ids, mask = torch.randint(3, VOCAB, (B, S)), torch.ones(B, S, dtype=torch.long)
    for row in range(B if side != "none" else 0):
        mask[row, slice(0, row) if side == "left" else slice(S - row, S)] = 0
    return ids, mask


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_equals_concatenated_embeddings(name: str, side: str) -> None:
    bare, model, prompt = prompted(name)
    ids, mask = rows(side)
    counts = name.startswith(("T5", "MT5"))  # ALBERT's prompt is in front of the padding: its positions are absolute

    def concatenated(embedding: Tensor) -> Tensor:
        found = []
        for row, real in zip(bare.get_input_embeddings()(ids), mask, strict=True):
            n = int(real.argmax()) if counts else 0
            whole = torch.cat([row[:n], embedding, row[n:]])[None]
            seen = torch.cat([real[:n], real.new_ones(P), real[n:]])[None]
            output = bare(inputs_embeds=whole, attention_mask=seen)[0][0]
            found.append(torch.cat([output[:n], output[n + P :]]))
        return torch.stack(found)[mask.bool()]

    def oracle() -> list[Tensor]:
        twin = prompt.embedding.detach().clone().requires_grad_()
        want = concatenated(twin)
        return [want, *torch.autograd.grad(want.square().sum(), [twin])]

    eager = oracle()
    with StayingInDouble():
        truth = oracle()
    output = model(input_ids=ids, attention_mask=mask)[0]
    assert output.shape[:2] == (B, S)
    got = output[mask.bool()]
    got.square().sum().backward()
    assert_model_rule([got, prompt.embedding.grad], eager, truth)
    assert (prompt.embedding.grad.abs().sum(-1) > 0).all()


def test_left_padding_leaves_t5_s_rows_as_they_are() -> None:
    _, model, _ = prompted("T5EncoderModel")
    ids, mask = rows("left")
    got = model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
    for i, real in enumerate(mask.bool()):
        alone = model(input_ids=ids[i : i + 1, real], output_hidden_states=True)
        for x, y in zip((got[0], *got.hidden_states), (alone[0], *alone.hidden_states), strict=True):
            torch.testing.assert_close(x[i, real], y[0], rtol=1e-9, atol=1e-9)


def test_a_decoder_s_prompt_still_needs_positions_that_move() -> None:
    config = transformers.BartConfig(vocab_size=VOCAB, d_model=32, decoder_layers=2, decoder_attention_heads=4)
    model = transformers.BartForCausalLM(config)
    with pytest.raises(ValueError, match="BartForCausalLM, whose forward takes no position_ids"):
        fastprefix.attach(model, PromptConfig(P))
