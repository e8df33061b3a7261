"""The nearest tokens of a prefix are those of its text; by values as a whole forward gives them, in fp64."""

from __future__ import annotations

import pytest
import torch

import fastprefix
from fastprefix import LlamaAdapterConfig, PrefixConfig, PromptConfig, analysis, init
from fastprefix.analysis import tokens
from tests.analysis.dense import TOLERANCE, attached
from tests.model_zoo import encoder_decoders
from tests.model_zoo.architectures import ROWS, VOCAB
from tests.model_zoo.inputs import P, inputs


class Tokenizer:
    def decode(self, ids: list[int]) -> str:
        return f"<{ids[0]}>"


@pytest.mark.parametrize("layers", [None, [1]])
@pytest.mark.parametrize("chunk", [1, 7, 4096])
@pytest.mark.parametrize("name", ["llama_gqa", "gpt2", "gemma2"])
def test_values(name: str, chunk: int, layers: list[int] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "_CHUNK", chunk)
    model, pairs = attached(name, layers=layers)
    before = model(**inputs(name)).logits
    found = analysis.nearest(model, k=3)
    assert torch.equal(model(**inputs(name)).logits, before) and not model.training
    own = next(iter(pairs.values()))[1].detach()
    fastprefix.detach(model)
    cache = model(input_ids=torch.arange(VOCAB)[:, None], use_cache=True).past_key_values
    theirs = cache.layers[0 if layers is None else 1].values[:, :, 0].flatten(1).detach()
    cosines = torch.nn.functional.cosine_similarity(own.transpose(0, 1).flatten(1)[:, None], theirs, dim=2)
    scores, ids = cosines.topk(3)
    assert torch.equal(found.ids, ids) and found.by == "values" and found.tokens is None
    torch.testing.assert_close(found.cosine, scores, **TOLERANCE)


def test_a_text_is_nearest_to_itself() -> None:
    model = ROWS["llama_gqa"].build()
    fastprefix.attach(model, PrefixConfig(init=init.token_ids([9, 5, 20])))
    found = analysis.nearest(model, tokenizer=Tokenizer(), k=2)
    assert found.tokens is not None and [row[0] for row in found.tokens] == ["<9>", "<5>", "<20>"]
    torch.testing.assert_close(found.cosine[:, 0], torch.ones(3).double(), rtol=0, atol=1e-5)
    fastprefix.attach(model, PromptConfig(init=init.token_ids([7, 8])), "prompt")
    found = analysis.nearest(model, "prompt", 1, Tokenizer())
    assert found.tokens == (("<7>",), ("<8>",)) and found.by == "embeddings"
    pytest.importorskip("matplotlib")
    assert found.plot().axes[0].patches and found.to_dict()["ids"] == [[7], [8]]


def test_wrong_calls() -> None:
    model = ROWS["llama_gqa"].build()
    fastprefix.attach(model, PrefixConfig(P))
    for k in (0, VOCAB + 1, "3"):
        with pytest.raises(ValueError, match=rf"k: got {k!r}, expected an int from 1 to {VOCAB}"):
            analysis.nearest(model, k=k)
    fastprefix.attach(model, LlamaAdapterConfig(2), "added")
    with pytest.raises(ValueError, match="name: got 'added', a LLaMA-Adapter"):
        analysis.nearest(model, "added")
    with pytest.raises(ValueError, match="name: got 'default' of an encoder-decoder"):
        analysis.nearest(encoder_decoders.attached("t5")[0])
    with pytest.raises(ValueError, match="which reads pixel_values"):
        analysis.nearest(attached("vit")[0])
